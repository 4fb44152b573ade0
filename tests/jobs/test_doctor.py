"""`dmd doctor`: a healthy machine passes, and every broken thing is named with what to do."""

import json
import os
import shutil
from collections import namedtuple
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jobs import doctor_machine, doctor_store
from jobs.cli import main
from jobs.config import load_recipe, resolve_shipped
from jobs.doctor_cluster import check_cluster, placement
from jobs.doctor_teacher import TeacherChecks
from jobs.errors import Exit
from jobs.session import open_session
from pipelines.config import StorageSection
from pipelines.placement import NodeFacts
from pipelines.storage import open_store
from tests.cluster.fake_job_server import job_server, remember
from tests.s3_servers import careless_server, new_bucket

DEAD = "http://127.0.0.1:1"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def doctor(tiny_teacher_dir, tmp_path, capsys):
    """(exit code, name of check → check, stderr) of `dmd doctor --json` of the tiny recipe."""
    (tmp_path / "prompts.txt").write_text("a red fox\na blue whale\n")

    def run(*arguments: str, **settings: object):
        base: dict[str, object] = {
            "run.dir": tmp_path / "run",
            "teacher.path": tiny_teacher_dir,
            "pairs.prompts": tmp_path / "prompts.txt",
        }
        merged = base | {key.replace("__", "."): value for key, value in settings.items()}
        chosen = [part for key, value in merged.items() for part in ("--set", f"{key}={value}")]
        code = main(["doctor", "--config", "tiny", "--json", *chosen, *arguments])
        out, err = capsys.readouterr()
        return code, {check["name"]: check for check in json.loads(out)["checks"]}, err

    run.folder = tmp_path
    return run


def failed(checks: dict[str, dict]) -> list[str]:
    return [name for name, check in checks.items() if check["status"] == "fail"]


# ------------------------------------------------------------------ the whole


def test_a_healthy_laptop_passes_and_nothing_is_left(doctor):
    code, checks, _ = doctor()
    assert code == Exit.OK and not failed(checks)
    assert checks["cluster"]["status"] == "skip" and "no address" in checks["cluster"]["found"]
    for name in ("python", "packages", "store: run.dir", "conditional put: run.dir", "teacher"):
        assert checks[name]["status"] == "ok", name
    # A teacher of random weights denoises under no reading.
    assert checks["prediction type"]["status"] == "warn"
    assert not (doctor.folder / "run").exists()


def test_what_fails_is_named_with_what_to_do(doctor):
    code, checks, err = doctor(teacher__path=doctor.folder / "nowhere", pairs__prompts="nope.txt")
    assert code == Exit.REFUSED
    assert failed(checks) == ["prompts", "teacher"]
    assert all(checks[name]["advice"] for name in failed(checks))
    assert "checks failed: prompts, teacher" in err


def test_a_dry_run_touches_nothing(doctor, tmp_path, capsys):
    code = main(["doctor", "--config", "tiny", "--dry-run", "--set", f"run.dir={tmp_path / 'r'}"])
    assert code == Exit.OK and f"{tmp_path / 'r'}/.doctor-" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()


# ------------------------------------------------------------------ stores


def test_a_store_that_keeps_its_word(doctor, s3_options):
    store = new_bucket(s3_options, "doctor")
    s3 = {"run__dir": store.url, "storage__endpoint_url": s3_options.endpoint_url}
    _, checks, _ = doctor(**s3, teacher__path=doctor.folder / "nowhere")
    assert failed(checks) == ["teacher"]
    assert checks["credentials"]["found"] == "from the environment"
    for name in ("endpoint", "store: run.dir", "conditional put: run.dir", "clock: run.dir"):
        assert checks[name]["status"] == "ok", name
    assert not store.fs.exists(store.root) or store.fs.ls(store.root) == []


def test_an_endpoint_that_does_not_answer(doctor):
    s3 = {"run__dir": "s3://bucket/run", "storage__endpoint_url": DEAD}
    code, checks, _ = doctor(**s3, teacher__path=doctor.folder / "nowhere")
    assert code == Exit.REFUSED and failed(checks) == ["endpoint", "teacher"]
    assert "does not answer" in checks["endpoint"]["found"]
    assert "store: run.dir" not in checks  # nothing more is asked of it


def test_a_store_that_ignores_conditions(tmp_path):
    with careless_server(tmp_path / "server") as url:
        store = new_bucket(StorageSection(endpoint_url=url), "careless")
        checks = {check.name: check for check in doctor_store.check_store("run.dir", store)}
    assert checks["store: run.dir"].status == "ok"
    conditional = checks["conditional put: run.dir"]
    assert conditional.status == "fail" and "If-None-Match" in conditional.found


def test_a_bucket_that_is_not_there(s3_options):
    store = open_store("s3://no-such-bucket/run", s3_options)
    (check,) = doctor_store.check_store("run.dir", store)
    assert check.status == "fail" and "bucket" in check.advice


def test_missing_credentials_are_missed_and_never_shown(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    found = doctor_store.credentials(StorageSection())
    assert found.status == "ok" and "canary" not in str(found)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert doctor_store.credentials(StorageSection()).status == "fail"
    unknown = doctor_store.credentials(StorageSection(profile="nobody"))
    assert unknown.status == "fail" and "nobody" in unknown.found


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    (check,) = doctor_store.check_store("run.dir", open_store(str(tmp_path / "run")))
    tmp_path.chmod(0o700)
    assert check.status == "fail" and "rights" in check.advice


@pytest.mark.parametrize(
    ("shift", "status", "words"),
    [
        (0, "ok", "within"),
        (-60, "warn", "ahead of"),
        (60, "warn", "behind"),
        (900, "fail", "behind"),
    ],
)
def test_clocks_are_compared_in_whole_seconds(shift, status, words):
    now = datetime(2026, 1, 1, 12, 0, 0, 700_000, tzinfo=UTC)
    stamp = now.replace(microsecond=0) + timedelta(seconds=shift)
    check = doctor_store._skew("clock", stamp, now, now + timedelta(milliseconds=20))
    assert check.status == status and words in check.found


def test_a_refusal_by_clock_is_understood(monkeypatch):
    headers = {"date": "Thu, 01 Jan 2026 00:00:00 GMT"}
    cause = RuntimeError()
    cause.response = {"ResponseMetadata": {"HTTPHeaders": headers}}
    try:
        raise PermissionError("RequestTimeTooSkewed") from cause
    except PermissionError as error:
        assert "set the clock" in doctor_store._advice(error)


# ------------------------------------------------------------------ the machine


def test_packages_are_held_against_what_is_declared(monkeypatch):
    from importlib.metadata import version

    assert doctor_machine.package_versions().status == "ok"
    old = {"diffusers": "0.30.0"}
    monkeypatch.setattr(doctor_machine, "version", lambda name: old.get(name) or version(name))
    check = doctor_machine.package_versions()
    assert check.status == "fail" and "diffusers 0.30.0" in check.found

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor_machine, "metadata", absent)  # as from a checkout
    check = doctor_machine.package_versions()
    assert check.status == "fail" and "diffusers 0.30.0" in check.found
    monkeypatch.setattr(doctor_machine, "version", absent)
    check = doctor_machine.package_versions()
    assert "torch is not installed" in check.found and "peft" not in check.found


def test_a_torchvision_that_cannot_be_imported(tmp_path, monkeypatch):
    """As one built for another torch: it is installed, and its import ends with an error."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    about = tmp_path / "torchvision-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor_machine.torchvision()
    assert check.status == "fail" and "nms does not exist" in check.found
    (package / "__init__.py").write_text("")
    assert doctor_machine.torchvision().status == "ok"


def test_a_full_disk_and_little_shared_memory(monkeypatch, tmp_path):
    stores = {"run.dir": open_store(str(tmp_path))}
    assert doctor_machine.disk(stores, 0)[0].status == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 << 30, 99 << 30, 1 << 30))
    run, temporary = doctor_machine.disk(stores, 5 << 30)
    assert run.status == "fail" and "checkpoints need 5 GiB" in run.found
    assert temporary.status == "warn" and "spill" in temporary.advice
    assert doctor_machine.disk(stores, 0)[0].status == "warn"
    if Path("/dev/shm").is_dir():
        small = load_recipe("tiny", ["ray.object_store_mb=4096"])
        assert doctor_machine.shared_memory(small).status == "warn"
        assert doctor_machine.shared_memory(load_recipe("tiny", [])).status == "ok"


def test_a_gpu_that_is_asked_for_and_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    asking = ["train.use_gpu=true"]
    check = doctor_machine.devices(load_recipe("tiny", asking))
    assert check.status == "fail" and "train.use_gpu" in check.found
    elsewhere = load_recipe("tiny", [*asking, "ray.address=head:6379"])
    assert doctor_machine.devices(elsewhere).status == "ok"
    assert doctor_machine.devices(load_recipe("tiny", [])).status == "ok"


# ------------------------------------------------------------------ the cluster


@pytest.mark.parametrize("address", ["127.0.0.1:1", DEAD])
def test_a_cluster_that_is_not_there(address):
    (check,) = check_cluster(load_recipe("tiny", []), address)
    assert check.status == "fail" and "127.0.0.1:1" in check.found and check.advice


def test_a_cluster_of_another_ray(monkeypatch):
    server = SimpleNamespace(ray_version="2.40.0")
    monkeypatch.setattr("jobs.doctor_cluster.connect", lambda address: server)
    (check,) = check_cluster(load_recipe("tiny", []), "http://head:8265")
    assert check.status == "fail" and "Ray 2.40.0" in check.found and "constraints" in check.advice


def test_the_local_cluster_is_looked_at_with_its_token(monkeypatch, tmp_path):
    """By its address, and as the one that `dmd submit` takes while the work runs here."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = load_recipe("tiny", [])
    assert "job server" not in [check.name for check in check_cluster(recipe, None)]
    with job_server() as fake:
        remember(fake, tmp_path, "secret")
        (check,) = check_cluster(recipe, fake.address)
        assert check.status == "ok"
        assert [check.status for check in check_cluster(recipe, None)][-1] == "ok"
        fake.token = "another"
        beside = check_cluster(recipe, None)[-1]
    assert (beside.name, beside.status) == ("job server", "warn")
    assert "wants another token" in beside.found


def test_room_for_the_work_of_a_recipe(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    nodes = [NodeFacts({"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0}, {"pool": "teacher"})]
    asked = ["pairs.gpus_per_actor=0.5", "pairs.actors=2", "train.use_gpu=true"]
    asked += ["pairs.placement.label_selector={pool: teacher}", "train.num_workers=2"]
    checks = {check.name: check for check in placement(load_recipe("tiny", asked), nodes)}
    assert checks["room: teachers"].status == "ok"
    workers = checks["room: training workers"]
    assert workers.status == "fail" and "room for 1 of 2" in workers.found
    on_demand = load_recipe("tiny", [*asked, "ray.autoscaling=true"])
    checks = {check.name: check for check in placement(on_demand, nodes)}
    assert checks["room: training workers"].status == "warn"


# ------------------------------------------------------------------ the teacher


def relabelled(folder: Path, target: Path, prediction: str) -> str:
    shutil.copytree(folder, target)
    config = target / "scheduler" / "scheduler_config.json"
    content = json.loads(config.read_text()) | {"prediction_type": prediction}
    config.write_text(json.dumps(content))
    return str(target)


def label_of(teacher: str):
    recipe = [f"teacher.path={teacher}", "pairs.prompts=shipped:demo"]
    with open_session("tiny", recipe, quiet=True) as session:
        return TeacherChecks(session, session.teacher_dir).label(deep=False)


@pytest.mark.slow
def test_the_shipped_teacher_predicts_what_it_says():
    check = label_of(resolve_shipped("shipped:emoji"))
    assert check.status == "ok" and "labelled v_prediction" in check.found


def test_a_v_prediction_teacher_labelled_epsilon_is_found(tmp_path):
    shipped = Path(resolve_shipped("shipped:emoji"))
    check = label_of(relabelled(shipped, tmp_path / "teacher", "epsilon"))
    assert check.status == "fail" and "it predicts v_prediction" in check.found
    assert "prediction_type: v_prediction" in check.advice


@pytest.mark.slow
def test_memory_is_told_for_usual_gpus_and_compared_with_what_is_here(
    tiny_teacher_dir, monkeypatch
):
    arguments = [f"teacher.path={tiny_teacher_dir}", "train.num_workers=2", "pairs.actors=3"]
    arguments += ["train.mixed_precision=bf16", "train.parallel.gradient_checkpointing=true"]
    with open_session("tiny", arguments, quiet=True) as session:
        checks = TeacherChecks(session, tiny_teacher_dir)
        found = {check.name: check for check in checks.memory()}
        assert (
            found["memory: training"].status == "ok" and "24 GB" in found["memory: training"].found
        )
        assert found["memory: training here"].found.startswith("2 ×")
        assert found["memory: teachers here"].found.startswith("3 ×")
        monkeypatch.setattr("jobs.doctor_teacher.GPUS", {"24 GB": 22.0, "tiny": 1.0})
        small = next(check for check in checks.memory() if check.name == "memory: training")
        assert small.advice == "tiny: nothing that is known here"
        memory = SimpleNamespace(total=1 << 20)
        monkeypatch.setattr("jobs.doctor_teacher.psutil.virtual_memory", lambda: memory)
        here = {check.name: check.status for check in checks.memory()}
        assert here["memory: training here"] == here["memory: teachers here"] == "fail"
        assert checks.checkpoint_space > 0
