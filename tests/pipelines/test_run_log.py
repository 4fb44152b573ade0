"""A run's own log: its lines, and its pictures, of which those of steps that were given up go."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines import patience
from pipelines import run_log as module
from pipelines.fence import Fence
from pipelines.lease import hold_lease
from pipelines.run_log import RunLog
from pipelines.sample_files import sample_files, sample_path
from pipelines.storage import Store, open_store
from pipelines.workers import Group

PICTURES = [np.zeros((1, 2, 2, 3), np.uint8)] * 2


@pytest.fixture(params=["disk", "s3"])
def run(request, tmp_path) -> Store:
    """A run folder under its first lease."""
    on_disk = request.param == "disk"
    store = open_store(str(tmp_path / "run")) if on_disk else request.getfixturevalue("s3_store")
    with hold_lease(store, period_s=30, purpose="a test"):
        pass
    return store


def _log(run: Store, step: int, *, rank: int = 0, lease: int = 1) -> RunLog:
    return RunLog(run, Group(rank, 2), Fence(run, lease), "none", step)


def _sampled(run: Store) -> list[int]:
    return [file.step for file in sample_files(run)]


def test_a_rollback_takes_the_pictures_of_the_steps_that_it_gives_up(run):
    log = _log(run, 0)
    for step in (0, 10, 20, 30):
        log.pictures(step, PICTURES, surely=True)
    run.fs.pipe_file(run.path("samples", "notes.txt"), b"somebody's own")
    _log(run, 30, rank=1).rewind(10)  # only rank 0 writes
    assert _sampled(run) == [0, 10, 20, 30]
    log.rewind(10)
    assert _sampled(run) == [0, 10]
    assert run.fs.exists(run.path("samples", "notes.txt"))
    log.pictures(15, PICTURES, surely=True)
    assert _sampled(run) == [0, 10, 15]


def test_a_start_takes_the_pictures_of_the_work_that_was_lost(run):
    log = _log(run, 0)
    for step in (0, 10, 20, 30):
        log.pictures(step, PICTURES, surely=True)
    _log(run, 20)
    assert _sampled(run) == [0, 10, 20]
    with hold_lease(run, period_s=30, purpose="another training"):
        pass
    _log(run, 0, lease=1)  # of the first, which lost the folder
    assert _sampled(run) == [0, 10, 20]


def test_a_store_that_is_away_costs_a_warning(run, monkeypatch, caplog):
    log = _log(run, 0)
    log.pictures(10, PICTURES, surely=True)

    def away(store, path):
        raise OSError("connection refused")

    monkeypatch.setattr(module, "delete_if_there", away)
    log.rewind(5)
    assert "sample pictures after step 5 not removed: connection refused" in caplog.text
    assert run.fs.exists(sample_path(run, 10))


def test_what_must_be_there_waits_for_the_store(run, monkeypatch, caplog):
    """The run's last pictures and lines; with the store back after the third pause."""
    log, write, pauses = _log(run, 0), module.write_atomic, []
    log.append({"step": 10, "loss_dm": 1.0})

    def away(fs, path, data):
        if len(pauses) < 3:
            raise OSError("connection refused")
        write(fs, path, data)

    monkeypatch.setattr(module, "write_atomic", away)
    monkeypatch.setattr(patience.time, "sleep", pauses.append)
    log.pictures(5, PICTURES)
    assert _sampled(run) == [] and not pauses
    log.pictures(10, PICTURES, surely=True)
    assert _sampled(run) == [10] and pauses == list(patience.PAUSES_S[:3])
    assert "sample pictures of step 10: connection refused; trying again in 5 s" in caplog.text


def test_curves_that_cannot_be_copied_end_no_run(run, monkeypatch, caplog):
    log = _log(run, 0)
    for name in ("rewind", "close"):

        def away(*arguments):
            raise OSError("connection refused")

        monkeypatch.setattr(module.MetricsLog, name, away)
    log.rewind(0)
    log.close()
    assert caplog.text.count("curves not written: connection refused") == 2


def test_every_tracker_is_ended_whatever_another_raises(run):
    ended = []

    class Tracker:
        def __init__(self, name):
            self.name = name

        def close(self):
            ended.append(self.name)
            raise OSError("connection refused")

    log = module.MetricsLog(run, resume_step=0, trackers=[Tracker("a"), Tracker("b")])
    with pytest.raises(OSError, match="connection refused"):
        log.close()
    assert sorted(ended) == ["a", "b"]


@pytest.mark.parametrize(("flush_s", "flushes"), [(0.0, 100), (2.0, 5)])
def test_less_than_a_hundredth_of_the_time_is_spent_on_writing_lines(
    tmp_path, monkeypatch, flush_s, flushes
):
    """In a thousand seconds with a line in each; a save writes at once."""
    store, now, written = open_store(str(tmp_path / "run")), [0.0], []
    with hold_lease(store, period_s=30, purpose="a test"):
        pass
    log = _log(store, 0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    flush = module.MetricsLog.flush

    def slow(self):
        now[0] += flush_s
        written.append(now[0])
        flush(self)

    monkeypatch.setattr(module.MetricsLog, "flush", slow)
    for step in range(1, 1000):
        log.append({"step": step})
        now[0] += 1
    assert len(written) == flushes
    assert flush_s * len(written[:-1]) <= now[0] / 100
    log.append({"step": 1000})
    log.flush()  # as a save does
    assert [line["step"] for line in _lines(store)] == list(range(1, 1001))


def test_the_last_lines_before_an_error_are_there(run):
    log = _log(run, 0)
    for step in (10, 20):
        log.append({"step": step})
    assert [line["step"] for line in _lines(run)] == [10]
    log.close()
    assert [line["step"] for line in _lines(run)] == [10, 20]


def _lines(store: Store) -> list[dict]:
    content = store.fs.cat_file(store.path("metrics.jsonl"))
    return [json.loads(line) for line in content.splitlines()]
