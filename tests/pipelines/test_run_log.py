"""The pictures of a run's own log: those of steps that were lost or given up go."""

import numpy as np
import pytest

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
