"""Verbs as jobs of a local cluster of three nodes, started as users do, and nodes that die."""

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from cluster.local_cluster import LocalCluster, local_cluster
from dmd_core.files import is_local
from jobs.config import load_recipe
from jobs.errors import Exit
from pipelines.config import StorageSection
from pipelines.storage import Store, open_store
from tests import s3_servers
from tests.chaos.whole import assert_whole, landed_table_ids, sealed_manifests, stored_ids
from tests.cluster.on_cluster import (
    ROOT,
    Command,
    Terminal,
    arguments,
    committed_rows,
    holding,
    kill_node_with,
    nodes_with,
)

PROMPTS, BLOCK = 64, 8
TEACHER, TRAINER, SAMPLER = "TeacherActor", "RayTrainWorker", "_SamplerActor"
CANARY = f"canary{uuid.uuid4().hex}"
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "keyofthecluster", "AWS_SECRET_ACCESS_KEY": CANARY}
# The cluster's own: credentials of the store, and less patience with a lost node, of Ray and of Ray
# Train (a node that does not answer five times is dead; Ray asks every three seconds).
_OF_CLUSTER = {
    **_CREDENTIALS,
    "OMP_NUM_THREADS": "1",
    "RAY_health_check_period_ms": "1000",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _OF_CLUSTER.items():
            patch.setenv(name, value)
        context = local_cluster(nodes=3, cpus=4, object_store_mb=150)
        cluster = context.__enter__()
    try:
        yield cluster
    finally:
        context.__exit__(None, None, None)


@pytest.fixture
def cluster(three_nodes, monkeypatch) -> LocalCluster:
    """With all of its nodes, however the test before has left it."""
    with monkeypatch.context() as patch:
        for name, value in _OF_CLUSTER.items():
            patch.setenv(name, value)
        three_nodes.up(three_nodes.record.size, tied=True)
    return three_nodes


@pytest.fixture
def terminal(cluster, tmp_path) -> Iterator[Terminal]:
    (tmp_path / "terminal").mkdir()
    found = Terminal(cluster, tmp_path / "terminal")
    yield found
    found.close()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """What pairs, train and evaluate leave for one another."""
    return tmp_path_factory.mktemp("run") / "run"


@pytest.fixture
def settings(run_dir, tiny_teacher_dir) -> dict[str, object]:
    return tiny(run_dir, tiny_teacher_dir) | {"pairs.steps": 240}


def tiny(folder: Path, teacher: str, *, prompts: int = PROMPTS) -> dict[str, object]:
    """Of a run in `folder`, with the lists that it reads beside it."""
    for name, count in (("prompts", prompts), ("held_out", 16)):
        path = folder.parent / f"{name}.txt"
        path.write_text("\n".join(f"{name} {index}" for index in range(count)))
    return {
        "run.dir": folder, "teacher.path": teacher,
        "pairs.prompts": folder.parent / "prompts.txt",
        "evaluate.prompts": folder.parent / "held_out.txt",
        "pairs.rows_per_block": BLOCK, "pairs.actors": 2,
    }  # fmt: skip


# ------------------------------------------------------------------------ verb by verb


def test_pairs_go_on_when_a_node_with_a_teacher_dies(cluster, terminal, settings, run_dir):
    job = terminal.ray_submit("pairs", settings)
    root = run_dir / "pairs"
    job.wait_until(lambda: committed_rows(root) >= BLOCK, "a first block")
    kill_node_with(cluster, TEACHER)
    assert committed_rows(root) < PROMPTS, "nothing was left to do"
    assert "succeeded" in job.finish()
    newest = assert_whole(root, PROMPTS)
    assert newest["rejected_ids"] == []
    assert stored_ids(root, newest) == landed_table_ids(root, newest["prompts_digest"])


def test_a_training_goes_on_when_its_node_dies(cluster, terminal, settings, run_dir):
    steps = 40
    changed = settings | {"train.max_train_steps": steps, "train.train_batch_size": 32}
    job = terminal.ray_submit("train", changed)

    def newest() -> int:
        return max(read_steps(run_dir), default=0)

    job.wait_until(lambda: newest() >= 2, "a first checkpoint")
    lost = kill_node_with(cluster, TRAINER)
    assert newest() < steps, "nothing was left to do"
    job.wait_until(lambda: nodes_with(cluster, TRAINER), "workers on the other node")
    assert nodes_with(cluster, TRAINER) != [lost]
    assert "succeeded" in job.finish()
    assert newest() == steps
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    settings["train.max_train_steps"] = steps


def test_an_evaluation_goes_on_when_a_node_dies(cluster, terminal, settings, run_dir):
    finished = settings | {"train.max_train_steps": 40, "train.train_batch_size": 32}
    terminal.dmd("export", *arguments(finished)).finish()  # needs no cluster
    job = terminal.ray_submit("evaluate", finished)
    job.wait_until(lambda: nodes_with(cluster, SAMPLER), "a sampler")
    kill_node_with(cluster, SAMPLER)
    assert not (run_dir / "metrics.json").exists(), "nothing was left to do"
    assert "succeeded" in job.finish()
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["provenance"]["inputs"]["step"] == 40


# ------------------------------------------------------------------------ the chain, and attach


def test_a_pipeline_outlives_its_terminal_and_a_node(cluster, terminal, tmp_path, tiny_teacher_dir):
    chain = tiny(tmp_path / "run", tiny_teacher_dir, prompts=16)
    words = ["pipeline", *arguments(chain | {"train.max_train_steps": 40})]
    lost = terminal.dmd("submit", *words)
    lost.wait_until(lambda: committed_rows(tmp_path / "run" / "pairs") >= BLOCK, "first pairs")
    lost.kill()
    again = terminal.dmd("attach")
    again.wait_until(lambda: nodes_with(cluster, TRAINER), "a training")
    kill_node_with(cluster, TRAINER)
    said = again.finish()
    assert "train: 40 steps" in said and "report" in said
    newest = json.loads((tmp_path / "run" / "latest.json").read_text())
    assert Path(newest["report"]).is_file() and Path(newest["student"]).is_dir()
    repeated = terminal.dmd("submit", *words, "--again").finish()
    for step in ("regenerate", "train", "export", "evaluate", "report"):
        assert f"{step}: nothing to do" in repeated


# ------------------------------------------------------------------------ by the clock


def test_a_schedule_fires_twice_and_makes_only_what_is_new(terminal, tmp_path, tiny_teacher_dir):
    job = tiny(tmp_path / "run", tiny_teacher_dir, prompts=16)
    root, prompts = tmp_path / "run" / "pairs", tmp_path / "prompts.txt"
    table = ["--store", tmp_path / "schedule"]
    added = ["add", "* * * * *", "--name", "each-minute", *table]
    terminal.dmd("schedule", *added, "--", "regenerate", *arguments(job)).finish()
    scheduler = terminal.dmd("schedule", "run", *table)
    scheduler.wait_until(lambda: len(sealed_manifests(root)) == 1, "a first version")
    first = assert_whole(root, 16)
    prompts.write_text(prompts.read_text() + "\na new prompt\nanother one")
    scheduler.wait_until(lambda: len(sealed_manifests(root)) == 2, "a second version")
    second = assert_whole(root, 18)
    old = {file["key"]: file["sha256"] for file in first["files"]}
    new = {file["key"]: file for file in second["files"]}
    assert {key: new[key]["sha256"] for key in old} == old
    assert sum(file["rows"] for key, file in new.items() if key not in old) == 2
    scheduler.kill()
    slots = list((tmp_path / "schedule" / "slots" / "each-minute").glob("*.result.json"))
    outcomes = [json.loads(slot.read_text())["outcome"] for slot in slots]
    assert outcomes.count("submitted") >= 2


# ------------------------------------------------------------------------ the job server


def test_a_terminal_dies_and_another_takes_over(cluster, terminal, tmp_path, tiny_teacher_dir):
    job = tiny(tmp_path / "run", tiny_teacher_dir, prompts=4000) | {"pairs.steps": 40}
    words = ["submit", "pairs", *arguments(job)]
    refused = terminal.dmd(*words, "--set", "pairs.prompts=/nowhere.txt")
    assert refused.process.wait(200) == Exit.REFUSED and "/nowhere.txt" in refused.said
    first = terminal.dmd(*words)
    first.wait_until(lambda: rows_told(first) > 0, "progress")
    first.kill()
    said = terminal.dmd("jobs", "--json").finish()
    (row,) = [row for row in json.loads(said)["jobs"] if row["state"] == "RUNNING"]
    assert row["progress"].startswith("pairs: ") and row["verb"] == "pairs"
    other = terminal.dmd("attach")
    other.wait_until(lambda: rows_told(other) > rows_told(first), "more progress")
    said = terminal.dmd("stop", row["id"]).finish()
    assert "STOPPED" in said and "dmd submit pairs" in said
    assert other.process.wait(60) == Exit.TRANSIENT
    again = f"{row['id']}-2"
    assert again in terminal.dmd(*words, "--no-wait").finish()
    terminal.dmd("stop", again).finish()


def test_a_slot_of_a_schedule_is_one_job_of_a_real_job_server(cluster, tmp_path):
    """In a process of its own, where Ray's client finds the cluster's token."""
    environment = cluster.environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    driver = [sys.executable, str(ROOT / "tests" / "cluster" / "job_server_driver.py")]
    done = subprocess.run(driver, env=environment, cwd=tmp_path, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "first": "submitted",
        "again": 0,
        "recovered": "submitted",
        "recovered_detail": "the cluster had it already",
        "status": "SUCCEEDED",
        "jobs": 1,
        "help_in_log": True,
    }


# ------------------------------------------------------------------------ a store, and its secret


@pytest.fixture
def strict_store(tmp_path, monkeypatch) -> Iterator[Store]:
    """Of a server that knows the cluster's credentials alone; here they are for this process."""
    for name, value in _CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3_servers, "ACCESS_KEY", _CREDENTIALS["AWS_ACCESS_KEY_ID"])
    monkeypatch.setattr(s3_servers, "SECRET_KEY", CANARY)
    with s3_servers.seaweedfs(tmp_path / "seaweed") as url:
        yield s3_servers.new_bucket(StorageSection(endpoint_url=url), "run")


def test_a_run_on_s3_has_its_credentials_from_the_cluster_and_tells_nobody(
    cluster, terminal, tmp_path, tiny_teacher_dir, strict_store
):
    """Then every byte that was left behind anywhere is searched for the secrets."""
    store = strict_store
    run = tiny(tmp_path / "local", tiny_teacher_dir, prompts=16)
    job = run | {"run.dir": store.url, "storage.endpoint_url": store.fs.endpoint_url}
    said = terminal.ray_submit("pipeline", job).finish()
    newest = json.loads(store.fs.cat_file(store.path("latest.json")))
    assert newest["report"].startswith(store.url) and not is_local(store.fs)
    report = open_store(newest["report"], load_recipe("tiny", arguments(job)[3::2]).storage)
    left = Path(cluster.record.place.root)
    places = {
        "the terminal": said.encode(),
        "the job server": job_server_says(cluster),
        "the report": report.fs.cat_file(report.root),
        **{path: store.fs.cat_file(path) for path in store.fs.find(store.root)},
        **{str(path): path.read_bytes() for path in left.rglob("*") if path.is_file()},
    }
    names = "\n".join(places)
    for expected in ("job-driver-", "config.yaml", "versions.json", "manifest", "checkpoints"):
        assert expected in names
    assert "the job server" in holding(places, "jobs.pipeline")  # it finds what is there
    for secret in (CANARY, Path(cluster.record.place.token).read_text()):
        assert holding(places, secret) == []


def job_server_says(cluster: LocalCluster) -> bytes:
    """All that it tells about jobs: the list, and each job's log."""
    token = Path(cluster.record.place.token).read_text()
    headers = {"Authorization": f"Bearer {token}"}
    reply = requests.get(f"{cluster.url}/api/jobs/", headers=headers, timeout=30)
    found = [reply.content]
    for job in reply.json():
        url = f"{cluster.url}/api/jobs/{job['submission_id']}/logs"
        found.append(requests.get(url, headers=headers, timeout=30).content)
    return b"\n".join(found)


def rows_told(command: Command) -> int:
    """By the last line of progress of a `pairs` that it follows."""
    found = re.findall(r"^pairs: (\d+)/", command.said, re.MULTILINE)
    return int(found[-1]) if found else 0


def read_steps(run_dir: Path) -> list[int]:
    """Steps with a complete checkpoint."""
    from fsspec.implementations.local import LocalFileSystem

    from dmd_core.checkpoint import committed_steps

    try:
        return committed_steps(LocalFileSystem(), str(run_dir / "checkpoints"))
    except FileNotFoundError:
        return []
