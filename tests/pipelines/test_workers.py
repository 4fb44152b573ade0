"""Ctrl-C while Ray Train is at work and after it; what workers of a lost lease may do."""

import os
import signal
import sys
from contextlib import nullcontext

import numpy as np
import pytest
from ray.train import WorkerGroupError

from pipelines import fence as module
from pipelines import workers as pool
from pipelines.fence import Fence
from pipelines.lease import LeaseLostError, hold_lease
from pipelines.run_log import RunLog
from pipelines.storage import open_store
from pipelines.workers import Group, _interruptible


def ends_the_process(signum, frame):
    """As Ray Train's handler does once it has ended the run."""
    sys.exit(0)


def test_an_interrupt_of_ray_train_is_one_of_ours_and_its_handler_goes():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _interruptible():
        signal.signal(signal.SIGINT, ends_the_process)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_that_was_left_behind_goes_too():
    before = signal.getsignal(signal.SIGINT)
    with _interruptible():
        signal.signal(signal.SIGINT, ends_the_process)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_end_by_another_signal_stays_one():
    with pytest.raises(SystemExit) as ended, _interruptible():
        sys.exit(15)
    assert ended.value.code == 15


@pytest.fixture
def taken(tmp_path):
    """A run folder that its second holder has."""
    store = open_store(str(tmp_path / "run"))
    for _ in range(2):
        with hold_lease(store, period_s=30, purpose="a test"):
            pass
    return store


def test_workers_of_a_lost_lease_write_neither_lines_nor_pictures(taken):
    log = RunLog(taken, Group(0, 1), Fence(taken, 1), "none", 0)
    log.append({"step": 1})
    log.flush(surely=True)
    log.pictures(1, [np.zeros((1, 2, 2, 3), np.uint8)] * 2, surely=True)
    assert sorted(os.listdir(taken.root)) == ["leases"]
    with pytest.raises(LeaseLostError, match=r"lost its lease 1 \(lease 2 was taken by"):
        Fence(taken, 1).check()

    log = RunLog(taken, Group(0, 1), Fence(taken, 2), "none", 0)
    log.append({"step": 1})
    log.flush(surely=True)
    assert sorted(os.listdir(taken.root)) == ["leases", "metrics.jsonl"]


def test_a_store_that_does_not_answer_is_no_lost_lease(taken, monkeypatch, caplog):
    def away(root, number):
        raise OSError("connection refused")

    monkeypatch.setattr(module, "check_fence", away)
    assert Fence(taken, 1).holds()
    assert "the lease cannot be looked at: connection refused" in caplog.text


def test_workers_are_counted_by_machine_however_many_nodes_it_plays(monkeypatch):
    names = [("a", True, 4), ("a", True, 4), ("b", True, 4), ("c", False, 4), ("head", True, 0)]
    nodes = [
        {"NodeManagerHostname": name, "Alive": alive, "Resources": {"CPU": cpus} if cpus else {}}
        for name, alive, cpus in names
    ]
    monkeypatch.setattr(pool.ray, "nodes", lambda: nodes)
    assert [pool.workers_per_machine(count) for count in (1, 2, 3, 8)] == [1, 1, 2, 4]


class _Trainer:
    """Of Ray Train: stores what it is told and fails as often as it is told."""

    def __init__(self, loop, *, train_loop_config, run_config, **_):
        self.steps, self.runs = train_loop_config["steps"], train_loop_config["runs"]
        self.runs.append(run_config.name)

    def fit(self):
        stored = self.steps.pop(0)
        if stored is not None:
            raise WorkerGroupError(f"a worker died at {stored}", {})


@pytest.mark.parametrize(
    ("steps", "starts"), [([None], 1), ([500, 900, None], 3), ([500, 500, None], 2)]
)
def test_failures_are_counted_anew_where_more_is_stored(tmp_path, monkeypatch, steps, starts):
    """A run of weeks loses more machines than `max_failures`; what fails at one place ends."""
    monkeypatch.setattr(pool, "TorchTrainer", _Trainer)
    left, runs = list(steps), []

    def stored():  # after so many starts
        return [step for step in steps[: len(runs)] if step]

    ends = starts == len(steps)
    with nullcontext() if ends else pytest.raises(WorkerGroupError, match="died at 500"):
        pool.run_worker_group(
            lambda config: None, {"steps": left, "runs": runs},
            store=open_store(str(tmp_path)), num_workers=1, cpus_per_worker=1,
            use_gpu=False, max_failures=0, stored=lambda: max(stored(), default=0),
        )  # fmt: skip
    assert len(runs) == len(set(runs)) == starts


def test_a_worker_that_sees_another_folder_says_so(taken, tmp_path):
    assert Fence(taken, 1).is_seen() and Fence(taken, 2).is_seen()
    assert not Fence(open_store(str(tmp_path / "elsewhere")), 2).is_seen()
