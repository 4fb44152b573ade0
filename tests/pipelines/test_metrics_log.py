"""The training log and what it shows in TensorBoard and Weights & Biases, each read back."""

import errno
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

from pipelines import metrics_log, progress
from pipelines.metrics_log import MetricsLog
from pipelines.storage import Store, open_store
from pipelines.trackers import TensorBoard, check_trackers, open_trackers, tracker_names


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store(str(tmp_path / "run"))


def _open(store: Store, resume_step: int = 0, report_to="tensorboard") -> MetricsLog:
    trackers = open_trackers(report_to, store, resume_step=resume_step)
    return MetricsLog(store, resume_step=resume_step, trackers=trackers)


def _written(store: Store) -> list[dict]:
    content = store.fs.cat_file(store.path("metrics.jsonl"))
    return [json.loads(line) for line in content.splitlines()]


def _tensorboard(store: Store, tag: str) -> dict[int, float]:
    """step → value as TensorBoard shows it: a start with a step hides what was written before at
    that step or later."""
    from tensorboardX.proto import event_pb2

    shown: dict[int, float] = {}
    for path in sorted(store.fs.ls(store.path("tensorboard"), detail=False)):
        data, at = store.fs.cat_file(path), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.HasField("session_log"):
                shown = {step: value for step, value in shown.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == tag:
                    shown[event.step] = value.simple_value
    return shown


# ---------------------------------------------------------------------- the file


def test_lines_after_the_resumed_step_are_gone(store):
    log = _open(store, report_to="none")
    for step in (10, 20, 30):
        log.append({"step": step, "loss_dm": float(step)})
    log.flush()
    resumed = _open(store, 20, "none")
    assert [line["step"] for line in resumed.lines] == [10, 20]
    resumed.append({"step": 30, "loss_dm": 0.5})
    resumed.flush()
    assert [line["loss_dm"] for line in _written(store)] == [10.0, 20.0, 0.5]


def test_what_is_not_finite_is_null(store):
    log = _open(store)
    log.append({"step": 1, "a": float("nan"), "b": float("inf"), "c": 1})
    log.flush()
    log.close()
    assert _written(store) == [{"step": 1, "a": None, "b": None, "c": 1}] == list(log.lines)
    assert _tensorboard(store, "train/a") == {} and _tensorboard(store, "train/c") == {1: 1.0}


def test_a_line_is_encoded_once_and_nothing_new_is_not_written(store, monkeypatch):
    """A week of fast steps is 160 MB of lines, and training waits for each flush."""
    encoded, written = [], []
    dumps, write = metrics_log.json.dumps, metrics_log.write_atomic
    monkeypatch.setattr(metrics_log.json, "dumps", lambda v: encoded.append(v) or dumps(v))
    monkeypatch.setattr(
        metrics_log, "write_atomic", lambda *args: written.append(args) or write(*args)
    )
    log = _open(store, report_to="none")
    for step in (10, 20, 30):
        log.append({"step": step, "loss_dm": float(step)})
        log.flush()
    log.flush()
    assert [line["step"] for line in encoded] == [10, 20, 30] and len(written) == 3
    log.rewind(20)
    log.flush()
    assert len(encoded) == 3 and len(written) == 4
    monkeypatch.undo()
    assert [line["step"] for line in _written(store)] == [10, 20]
    assert list(_open(store, 20, "none").lines) == _written(store)


# ---------------------------------------------------------------------- TensorBoard


@pytest.mark.parametrize("remote", [False, True])
def test_tensorboard_shows_only_what_a_rollback_and_a_resume_left(tmp_path, remote):
    """On the disk, and on a store that is none; all within one second, as it happens."""
    store = open_store(str(tmp_path / "run"))
    if remote:
        store = Store(fsspec.filesystem("memory"), f"/{tmp_path.name}/run")
    log = _open(store)
    for step in (10, 20, 30):
        log.append({"step": step, "loss_dm": float(step)})
    log.rewind(10)
    assert [line["step"] for line in log.lines] == [10]
    log.append({"step": 20, "loss_dm": 0.5})
    log.flush()
    log.close()
    assert _tensorboard(store, "train/loss_dm") == {10: 10.0, 20: 0.5}
    lost = _open(store, 20)
    lost.append({"step": 30, "loss_dm": 0.25})
    lost.close()
    resumed = _open(store, 20)
    resumed.append({"step": 25, "loss_dm": 2.0})
    resumed.add_scalars(25, {"validation/kid": 0.125})
    resumed.flush()
    resumed.close()
    assert _tensorboard(store, "train/loss_dm") == {10: 10.0, 20: 0.5, 25: 2.0}
    assert _tensorboard(store, "validation/kid") == {25: 0.125}
    assert [line["step"] for line in _written(store)] == [10, 20, 25]


def test_a_file_is_uploaded_when_it_has_grown_and_once_a_minute_at_most(tmp_path, monkeypatch):
    now, uploads = [1000.0], []
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    fs = fsspec.filesystem("memory")
    plain = fs.put_file

    def put_file(local: str, remote: str) -> None:
        uploads.append(Path(local).name)
        plain(local, remote)

    monkeypatch.setattr(fs, "put_file", put_file)
    board = TensorBoard(Store(fs, f"/{tmp_path.name}/run"), resume_step=0)
    file = Path(board._folder) / "events.of-the-test"
    for at, content, expected in (
        (0, b"a", 1),
        (10, b"ab", 1),  # too soon
        (61, b"ab", 2),
        (122, b"ab", 2),  # nothing new
        (183, b"abc", 3),
        (184, b"abcd", 3),
    ):
        now[0] = 1000.0 + at
        file.write_bytes(content)
        board.flush()
        assert uploads.count(file.name) == expected, f"after {at} s"
    board.close()  # whatever the time
    assert uploads.count(file.name) == 4
    assert fs.cat_file(f"/{tmp_path.name}/run/tensorboard/{file.name}") == b"abcd"


def test_tensorboard_shows_the_settings(store):
    board = TensorBoard(store, resume_step=0, settings={"train": {"learning_rate": 1e-5}})
    board.close()
    (path,) = store.fs.ls(store.path("tensorboard"), detail=False)
    assert b"learning_rate: 1.0e-05" in store.fs.cat_file(path)


def test_a_full_disk_ends_tensorboards_thread_and_not_the_training(store, monkeypatch):
    """Its queue would fill up, and training wait for a place in it for ever."""
    from tensorboardX.record_writer import RecordWriter

    board = TensorBoard(store, resume_step=0)
    write, full = RecordWriter.write, threading.Event()

    def written(self, event):
        if full.is_set():
            raise OSError(errno.ENOSPC, "no space left on device")
        return write(self, event)

    monkeypatch.setattr(RecordWriter, "write", written)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # it dies without a word to us
    full.set()
    training = threading.Thread(
        target=lambda: [board.scalars(step, {"train/a": 1.0}) for step in range(1, 41)], daemon=True
    )
    training.start()
    training.join(timeout=20)
    assert not training.is_alive(), "training waits for TensorBoard"

    deadline = time.monotonic() + 20
    while board._writes() and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(OSError, match="no space left"):  # a further file cannot be begun either
        board.flush()
    full.clear()
    with pytest.raises(OSError, match="events up to step 40 may be lost"):
        board.flush()
    board.flush()
    board.scalars(41, {"train/a": 41.0})
    board.close()
    assert _tensorboard(store, "train/a")[41] == 41.0


def test_pictures_reach_tensorboard(store):
    from tensorboardX.proto import event_pb2

    log = _open(store)
    log.add_picture("samples", 7, np.full((4, 6, 3), 200, np.uint8))
    log.close()
    (path,) = store.fs.ls(store.path("tensorboard"), detail=False)
    data, at, sizes = store.fs.cat_file(path), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4
        sizes += [(event.step, v.tag, v.image.height, v.image.width) for v in event.summary.value]
    assert sizes == [(7, "samples", 4, 6)]


# ---------------------------------------------------------------------- Weights & Biases

_WANDB_RUN = """
import sys
import numpy as np
from pipelines.metrics_log import MetricsLog
from pipelines.storage import open_store
from pipelines.trackers import open_trackers

store, resume_step = open_store(sys.argv[1]), int(sys.argv[2])
settings = {"seed": 7, "train": {"num_workers": 1 + resume_step}}
trackers = open_trackers(
    ["wandb", "tensorboard"], store, resume_step=resume_step, settings=settings
)
log = MetricsLog(store, resume_step=resume_step, trackers=trackers)
for step in (10, 20, 30):
    log.append({"step": resume_step + step, "loss_dm": 1 / step, "loss_reg": float("nan")})
log.rewind(resume_step + 20)
log.append({"step": resume_step + 30, "loss_dm": 0.75})
log.add_picture("samples", resume_step + 30, np.zeros((4, 4, 3), np.uint8))
log.flush()
log.close()
"""


def _train_with_wandb(tmp_path: Path, resume_step: int, port: int, **environment: str) -> None:
    """In a process of its own: wandb keeps what it read of the environment for a process's life."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    ours |= {
        "WANDB_MODE": "offline",
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", _WANDB_RUN, str(tmp_path / "my-run"), str(resume_step)]
    done = subprocess.run(
        command, env=ours | environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def _wandb_records(file: Path) -> Iterator:
    """The protobuf records of a `.wandb` file: LevelDB's log format in blocks of 32 KiB, after a
    header of 7 bytes that counts as part of the first block."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def _wandb_history(file: Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of every line of the history that holds `key`."""
    found = []
    for record in _wandb_records(file):
        if record.HasField("history"):
            items = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
            if key in items:
                found.append((json.loads(items["step"]), json.loads(items[key])))
    return found


@pytest.mark.slow
def test_wandb_offline_holds_the_numbers_of_one_run_across_a_resume(tmp_path):
    pytest.importorskip("wandb")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        _train_with_wandb(tmp_path, 0, port)
        _train_with_wandb(tmp_path, 20, port, WANDB_PROJECT="theirs")
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()  # nothing asked the server that the environment named
    run = tmp_path / "my-run"
    identity = json.loads((run / "wandb.json").read_text())["id"]
    folders = sorted((run / "wandb").glob("offline-run-*"))
    first, second = (folder / f"run-{identity}.wandb" for folder in folders)
    expected = [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30), (30, 0.75)]
    assert _wandb_history(first, "train/loss_dm") == expected
    assert [step for step, _ in _wandb_history(second, "train/loss_dm")] == [30, 40, 50, 50]
    assert _wandb_history(first, "train/loss_reg") == []
    ((step, path),) = _wandb_history(first, "samples.path")
    assert step == 30 and path.startswith("media/images/samples")
    named = [next(r.run for r in _wandb_records(f) if r.HasField("run")) for f in (first, second)]
    assert [(r.run_id, r.project, r.display_name) for r in named] == [
        (identity, "one-step-dmd", "my-run"),
        (identity, "theirs", "my-run"),
    ]
    configs = [{i.key: json.loads(i.value_json) for i in r.config.update} for r in named]
    assert [config["train"] for config in configs] == [{"num_workers": 1}, {"num_workers": 21}]
    assert _tensorboard(open_store(str(run)), "train/loss_dm")[30] == pytest.approx(1 / 10)


def test_a_torn_run_id_is_named(store):
    pytest.importorskip("wandb")
    from pipelines.trackers import _run_id

    store.fs.makedirs(store.root)
    store.fs.pipe_file(store.path("wandb.json"), b"{")
    with pytest.raises(ValueError, match=r"run/wandb\.json does not hold"):
        _run_id(store, None)


# ---------------------------------------------------------------------- the door


def test_trackers_are_checked_at_the_door(monkeypatch):
    assert tracker_names("none") == () and tracker_names(("wandb", "wandb")) == ("wandb",)
    with pytest.raises(ValueError, match="none stands alone"):
        check_trackers(("none", "wandb"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_trackers("tensorboard")
    with pytest.raises(ValueError, match=r"report_to: wandb needs .*-e '\.\[wandb\]'"):
        check_trackers(["tensorboard", "wandb"])
