"""The local cluster: what is started is known again, what is not ours is left alone."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import requests

from cluster import local_cluster as module
from cluster.local_cluster import LocalCluster, local_cluster
from cluster.nodes import (
    MARK,
    ClusterError,
    NodeRecord,
    Place,
    Size,
    _own_gpus,
    client_environment,
    free_port,
    new_token,
    node_environment,
)
from cluster.processes import Birth, end, family, find, marked, spawn
from cluster.record import ClusterRecord, locked, read_record, write_record
from jobs.cli import main

SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]
PARENT = [sys.executable, "-c", f"import subprocess; subprocess.run({SLEEP!r})"]


@pytest.fixture
def started(tmp_path):
    """Start programs that end with the test."""
    births = []

    def start(command=SLEEP, **environment) -> Birth:
        environment = os.environ | environment
        births.append(
            spawn(command, environment=environment, folder="/", output=str(tmp_path / "out"))
        )
        return births[-1]

    yield start
    end([process for birth in births for process in family(birth)])


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "cluster").mkdir()
    return tmp_path / "cluster"


def remembered(folder: Path, head: Birth, *, ready: bool = True, **place) -> ClusterRecord:
    """A record as `up` leaves it, of a cluster whose head is the process `head`."""
    root = folder.parent / "root"
    root.mkdir(exist_ok=True)
    (root / "head.out").write_text("the head says this\n")
    nodes = (NodeRecord("head", "127.0.0.2", head), NodeRecord("worker-1", "127.0.0.3", head))
    where = Place(**({"root": str(root), "gcs_port": 1, "token": None} | place))
    record = ClusterRecord(where, "http://127.0.0.1:1", "127.0.0.1", Size(nodes=2), nodes, ready)
    write_record(folder, record)
    return record


def wait_until(reached, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "not reached"
        time.sleep(0.05)


# ------------------------------------------------------------------------ processes


def test_a_process_is_known_by_its_birth_not_by_its_pid(started):
    birth = started()
    assert find(birth) is not None
    others = [replace(birth, ticks="1"), replace(birth, boot="another")]
    # Of an earlier release, or not of Linux: by its time alone.
    timed = replace(birth, ticks="", boot="")
    assert find(timed) is not None
    for other in (*others, replace(timed, created=birth.created - 1)):
        assert find(other) is None and family(other) == []
    end(family(birth))
    assert find(birth) is None


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's kernel")
def test_a_clock_that_is_set_ends_no_cluster(started, folder, monkeypatch):
    """What the system says a process was created at moves with the clock."""
    remembered(folder, started())
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 3600)
    record = read_record(folder)
    assert record is not None and module._works(record)
    assert len(family(record.nodes[0].process)) == 1


def test_the_record_of_an_earlier_release_is_read(started, folder):
    birth = started()
    remembered(folder, birth)
    path = folder / "cluster.json"
    content = json.loads(path.read_text())
    for node in content["nodes"]:
        node["process"] = {"pid": birth.pid, "created": birth.created}
    path.write_text(json.dumps(content))
    record = read_record(folder)
    assert record is not None and module._works(record)


def test_a_family_ends_together_and_a_bystander_goes_on(started):
    parent, bystander = started(PARENT), started(PARENT)
    wait_until(lambda: len(family(parent)) == len(family(bystander)) == 2)
    child = family(parent)[1]
    end(family(parent))
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert len(family(bystander)) == 2


def test_a_mark_finds_what_no_parent_leads_to(started):
    mine, other = started(PARENT, MY_MARK="a"), started(PARENT, MY_MARK="b")
    wait_until(lambda: len(family(mine)) == len(family(other)) == 2)
    child = family(mine)[1]
    find(mine).kill()  # the child has another parent now
    assert child in marked("MY_MARK", "a")
    assert not {process.pid for process in family(other)} & {
        process.pid for process in marked("MY_MARK", "a")
    }
    end(marked("MY_MARK", "a"))
    assert marked("MY_MARK", "a") == []


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's kernel")
def test_a_tied_process_dies_with_the_one_that_started_it(tmp_path):
    code = (
        "import os, sys, time; from cluster.processes import spawn; "
        "birth = spawn([sys.executable, '-c', 'import time; time.sleep(300)'], "
        f"environment=dict(os.environ), folder='/', output={str(tmp_path / 'out')!r}, tied=True); "
        "print(birth.pid, repr(birth.created), flush=True); time.sleep(300)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as one:
        pid, created = one.stdout.readline().split()
        tied = Birth(int(pid), float(created))
        wait_until(lambda: find(tied) is not None and "sleep" in " ".join(find(tied).cmdline()))
        one.kill()
    wait_until(lambda: find(tied) is None)


# ------------------------------------------------------------------------ what nodes inherit


def test_nodes_inherit_credentials_but_nothing_of_another_ray(monkeypatch):
    base = {
        "AWS_SECRET_ACCESS_KEY": "canary", "PATH": "/usr/bin", "RAY_ADDRESS": "10.0.0.1:6379",
        "RAY_API_SERVER_ADDRESS": "http://other:8265", "RAY_AUTH_TOKEN": "others",
        "RAY_START_HOOK": "others.hook", "RAY_AUTH_MODE": "disabled",
    }  # fmt: skip
    found = node_environment(Place("/tmp/root", 1, "/private/token"), base)
    assert found["AWS_SECRET_ACCESS_KEY"] == "canary"
    assert found["PATH"] == f"{Path(sys.executable).parent}{os.pathsep}/usr/bin"
    assert found["RAY_AUTH_MODE"] == "token" and found["RAY_AUTH_TOKEN_PATH"] == "/private/token"
    assert found[MARK] == "/tmp/root"
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_START_HOOK"):
        assert name not in found
    assert client_environment("http://x", None)["RAY_AUTH_MODE"] == "disabled"


def test_a_token_is_new_each_time_and_nobody_elses_business(tmp_path):
    path = tmp_path / "token"
    path.write_text("left over")
    path.chmod(0o644)
    new_token(path)
    first = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(bytes.fromhex(first)) == 32
    new_token(path)
    assert path.read_text() != first


def test_each_worker_gets_real_gpus_of_its_own_or_only_numbers(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5")
    assert [_own_gpus(index, 1) for index in range(4)] == ["3", "4", "5", None]
    assert [_own_gpus(index, 2) for index in range(2)] == ["3,4", None]
    assert _own_gpus(0, 0) is None


# ------------------------------------------------------------------------ records and broken starts


def test_a_damaged_record_is_named(folder):
    (folder / "cluster.json").write_text('{"version": 1, "nodes": [{}]}')
    with pytest.raises(ClusterError, match=r"cluster\.json is not the record"):
        read_record(folder)


def test_up_twice_starts_nothing_and_other_settings_are_refused(folder, started):
    head = started()
    record = remembered(folder, head)
    cluster = LocalCluster(folder)
    assert cluster.up(Size(nodes=2)) == []
    assert read_record(folder) == record
    for asked in ({"port": 8265}, {"dashboard_host": "0.0.0.0"}, {"auth": True}):
        with pytest.raises(ClusterError, match=r"other settings .* first"):
            cluster.up(Size(nodes=2), **asked)
    with pytest.raises(ClusterError, match="3 workers"):
        cluster.up(Size(nodes=4))
    with pytest.raises(ClusterError, match="object store: 256, asked for 512"):
        cluster.up(Size(nodes=2, object_store_mb=512))
    assert find(head) is not None


def test_down_ends_what_is_remembered_or_marked_and_no_other(folder, started):
    head, other = started(PARENT), started(PARENT, **{MARK: "/tmp/another"})
    record = remembered(folder, head)
    stray = started(SLEEP, **{MARK: record.place.root})
    # A pid of the record that is somebody else's now.
    reused = replace(started(), created=1.0, ticks="1")
    write_record(
        folder, replace(record, nodes=(*record.nodes, NodeRecord("worker-2", None, reused)))
    )
    wait_until(lambda: len(family(head)) == len(family(other)) == 2)
    child = family(head)[1]
    cluster = LocalCluster(folder)
    assert cluster.down() and not cluster.down()
    assert find(head) is None and find(stray) is None and not child.is_running()
    assert len(family(other)) == 2 and psutil.pid_exists(reused.pid)
    assert not Path(record.place.root).exists() and read_record(folder) is None
    assert (folder / "last-logs" / "head" / "head.out").read_text() == "the head says this\n"


def test_a_head_that_does_not_start_is_cleared_away_and_quoted(folder, monkeypatch):
    """And so is what an earlier start, killed in the middle, has left."""

    def broken_head(place, size, **options) -> NodeRecord:
        roots.append(Path(place.root))
        code = "import sys; sys.exit('the port is not mine')"
        process = spawn(
            [sys.executable, "-c", code],
            environment=node_environment(place, os.environ),
            folder=place.root,
            output=f"{place.root}/head.out",
        )
        return NodeRecord("head", None, process)

    roots: list[Path] = []
    monkeypatch.setattr(module, "start_head", broken_head)
    half_started = spawn(SLEEP, environment=os.environ, folder="/", output=os.devnull)
    remembered(folder, half_started, ready=False)
    with pytest.raises(ClusterError, match=r"head ended at once(.|\n)*the port is not mine"):
        LocalCluster(folder).up(Size())
    assert find(half_started) is None
    assert read_record(folder) is None and not roots[0].exists()
    assert not (folder / "token").exists()


def test_a_port_that_is_taken_is_refused_before_anything_starts(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"port {port} is taken"):
            LocalCluster(folder).up(Size(), port=port)
    assert read_record(folder) is None


# ------------------------------------------------------------------------ the command


def test_the_command_says_what_is_there(folder, capfd):
    where = ["--dir", str(folder)]
    assert main(["cluster", "status", *where]) == 0
    assert main(["cluster", "down", *where]) == 0
    assert "none" in (said := capfd.readouterr().err) and "there is none" in said
    assert main(["cluster", "up", "--nodes", "0", *where]) == 2
    assert "--nodes 0: expected 1 to 32" in capfd.readouterr().err
    for port in ("99999", "0", "-1"):
        assert main(["cluster", "up", f"--port={port}", *where]) == 2
        assert f"--port {port}: expected 1 to 65535" in capfd.readouterr().err
    assert main(["cluster", "env", *where]) == 3
    assert main(["cluster", "up", "--nodes", "5", "--dry-run", *where]) == 0
    assert "4 workers with 2 CPUs each" in capfd.readouterr().out
    assert not (folder / "cluster.json").exists()


def test_letting_others_in_is_warned_of_with_the_reason(folder, started, monkeypatch, capfd):
    remembered(folder, started())
    monkeypatch.setattr(LocalCluster, "up", lambda *args, **kwargs: ["head"])
    where = ["--dir", str(folder)]
    assert main(["cluster", "up", *where]) == 0
    assert "warning" not in capfd.readouterr().err
    assert main(["cluster", "up", "--dashboard-host", "0.0.0.0", *where]) == 0
    said = capfd.readouterr().err
    assert "has the token runs programs as you" in said and "ssh -L" in said
    assert main(["cluster", "up", "--no-auth", *where]) == 0
    assert "without a token every user" in capfd.readouterr().err


def test_a_shell_is_led_to_the_cluster_and_away_again(folder, started, capfd):
    """Past the token of another one, which Ray would send first."""
    remembered(folder, started(), token="/private/a token")
    where = ["--dir", str(folder)]
    assert main(["cluster", "env", *where]) == 0
    led = capfd.readouterr().out
    assert main(["cluster", "down", *where]) == 0
    away = capfd.readouterr().err.splitlines()[-1]
    shell = ["sh", "-c", f"{led}\necho $RAY_AUTH_TOKEN_PATH; {away}\nenv"]
    environment = {"PATH": os.defpath, "RAY_AUTH_TOKEN": "old"}
    said = subprocess.run(shell, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.startswith("/private/a token\n") and "RAY_" not in said


def test_gpus_that_this_machine_does_not_have_are_pointed_out(folder, monkeypatch, capfd):
    monkeypatch.setattr(LocalCluster, "up", lambda *args, **kwargs: ["head"])
    monkeypatch.setattr("jobs.cluster._result", lambda cluster: {})
    monkeypatch.setattr("jobs.cluster._exports", lambda cluster: "")
    monkeypatch.setattr(LocalCluster, "url", "http://x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    up = ["cluster", "up", "--dir", str(folder), "--gpus", "1", "--nodes"]
    assert main([*up, "1"]) == main([*up, "2"]) == 0
    assert "warning" not in capfd.readouterr().err
    assert main([*up, "3"]) == 0
    assert "Ray will count 2 GPUs; NVIDIA's driver shows 1" in capfd.readouterr().err


def test_a_command_that_waits_for_another_says_so(folder, capfd):
    said = ""

    def waits() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "waiting" in said

    command = threading.Thread(target=main, args=(["cluster", "down", "--dir", str(folder)],))
    with locked(folder):
        command.start()
        wait_until(waits)
    command.join()
    assert "there is none" in said + capfd.readouterr().err


# ------------------------------------------------------------------------ real Ray


def dmd(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jobs.cluster", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@contextlib.contextmanager
def clearing(folder: Path):
    """Whatever a failed test leaves is ended."""
    try:
        yield
    finally:
        LocalCluster(folder).down()


@pytest.mark.timeout(300)
def test_a_cluster_outlives_its_command_and_asks_for_the_token(folder):
    where = ("--dir", folder)
    port = free_port()
    with clearing(folder):
        up = dmd("up", "--nodes", 1, "--cpus", 3, "--port", port, "--json", *where)
        assert up.returncode == 0, up.stderr
        found = json.loads(up.stdout)
        assert found["started"] == ["head"] and found["url"] == f"http://127.0.0.1:{port}"
        assert requests.get(f"{found['url']}/api/version", timeout=10).status_code == 401
        status = LocalCluster(folder).status()
        assert [(node.name, node.state, node.cpus) for node in status.nodes] == [
            ("head", "alive", 3.0)
        ]
        listening = psutil.net_connections("tcp")
        hosts = {each.laddr.ip for each in listening if each.laddr.port == port}
        assert hosts == {"127.0.0.1"}
        family_before = family(LocalCluster(folder).record.nodes[0].process)
        assert dmd("down", *where).returncode == 0
        assert not [process for process in family_before if process.is_running()]
        secret = found["environment"]["RAY_AUTH_TOKEN_PATH"]
        assert not Path(secret).exists()


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_nodes_come_and_go_and_another_ray_does_not_notice(tmp_path):
    with local_cluster(nodes=1, cpus=1, object_store_mb=100) as other:
        with local_cluster(nodes=3, cpus=2, gpus=1, object_store_mb=100) as cluster:
            secret = Path(cluster.record.place.token).read_text()
            before = cluster.status()
            assert [node.cpus for node in before.nodes] == [0.0, 2.0, 2.0]
            deadline = time.monotonic() + 60  # the head tells what is in use every few seconds
            while before.usage["GPU"] != (0.0, 2.0):
                assert time.monotonic() < deadline, before.usage
                time.sleep(1)
                before = cluster.status()
            cluster.kill_node(2)
            states = [node.state for node in cluster.status().nodes]
            assert states == ["alive", "alive", "gone"]
            with pytest.raises(ClusterError, match="no worker-2 to kill; alive: worker-1"):
                cluster.kill_node(2)
            assert cluster.up(cluster.record.size, tied=True) == ["worker-2"]
            assert cluster.add_node(tied=True) == 3
            assert [node.state for node in cluster.status().nodes] == ["alive"] * 4
            for log in (file for folder in cluster.logs() for file in folder.rglob("*")):
                assert not log.is_file() or secret.encode() not in log.read_bytes(), log
            head = cluster.record.nodes[0].process
            os.kill(head.pid, signal.SIGKILL)
            wait_until(lambda: find(head) is None)
            with pytest.raises(ClusterError, match="head is gone"):
                cluster.status()
            cluster.up(Size(nodes=2, cpus=1, object_store_mb=100), tied=True)
            assert [node.cpus for node in cluster.status().nodes] == [0.0, 1.0]
            root = cluster.record.place.root
        assert marked(MARK, root) == [] and not Path(root).exists()
        assert other.status().nodes[0].state == "alive"


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_start_that_is_killed_in_the_middle_leaves_nothing_that_counts(folder):
    command = [sys.executable, "-m", "jobs.cluster", "up", "--dir", str(folder), "--nodes", "2"]
    with clearing(folder), subprocess.Popen(command, stderr=subprocess.DEVNULL) as up:
        wait_until(lambda: (folder / "cluster.json").exists() and read_record(folder).nodes)
        up.kill()
        up.wait()
        half = read_record(folder)
        assert not half.ready and find(half.nodes[0].process) is not None
        assert LocalCluster(folder).up(half.size, port=half.port) == ["head", "worker-1"]
        assert find(half.nodes[0].process) is None and not Path(half.place.root).exists()
        assert len(LocalCluster(folder).status().nodes) == 2
