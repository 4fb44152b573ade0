"""What a worker warns of, somewhere on a cluster, is seen by whoever waits for the verb."""

import logging
import subprocess
import sys
from contextlib import nullcontext

import pytest
from ray.train import WorkerGroupError

from jobs.session import open_session
from pipelines import progress
from pipelines.progress import Counters, warnings_passed
from pipelines.storage import open_store
from pipelines.workers import run_worker_group


def _warning_loop(config: dict) -> None:
    logging.getLogger("pipelines.anything").warning("%s: trying again", "the last save")
    if config["fails"]:
        raise ValueError("for good")


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("fails", [False, True])
def test_a_worker_s_warning_is_shown_by_the_verb(tmp_path, capfd, fails):
    group = {"num_workers": 1, "cpus_per_worker": 1, "use_gpu": False, "max_failures": 0}
    store = open_store(str(tmp_path / "run"))
    ends = pytest.raises(WorkerGroupError, match="for good") if fails else nullcontext()
    with open_session("tiny", [f"run.dir={store.url}"]) as session, session.watch("t", 1, "") as b:
        with ends:
            config = {"board": b, "fails": fails}
            run_worker_group(_warning_loop, config, store=store, stored=lambda: 0, **group)
        logging.getLogger("pipelines.anything").warning("of the driver's own")
    shown = capfd.readouterr().err
    assert shown.count("! the last save: trying again\n") == 1
    assert shown.count("! of the driver's own\n") == 1


def test_what_every_worker_says_at_once_is_one_warning(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    board = Counters()
    for text in ("a", "a", "b", "a"):
        board.warn(text)
    now[0] = 11.0
    board.warn("a")
    assert [one.text for one in board.warnings(0)] == ["a", "b", "a"]
    assert [one.text for one in board.warnings(2)] == ["a"]
    assert board.warnings(3) == []


def test_only_the_last_warnings_are_kept_and_their_numbers_go_on():
    board = Counters()
    for number in range(1000):
        board.warn(f"store away for the {number}th time")
    assert len(board.warnings(0)) < 100
    assert [one.number for one in board.warnings(998)] == [999, 1000]


def test_warnings_of_our_packages_are_passed_on_within_the_block():
    said: list[str] = []
    with warnings_passed(said.append):
        logging.getLogger("dmd_core.checkpoint").warning("%d parts", 3)
        logging.getLogger("pipelines.run_log").info("quiet")
        logging.getLogger("ray").warning("another's")
    logging.getLogger("pipelines.run_log").warning("after")
    assert said == ["3 parts"]


_LOGGED = """
import logging
from pipelines.progress import warnings_passed

def closed(text):
    raise BrokenPipeError(text)

with warnings_passed(closed):
    logging.getLogger("pipelines.run_log").warning("store away")
print("went on")
"""


def test_a_warning_stays_in_the_log_and_whoever_warns_goes_on():
    """In a process without logging of its own, and where nobody can be told."""
    done = subprocess.run([sys.executable, "-c", _LOGGED], capture_output=True, text=True)
    assert done.stdout == "went on\n" and done.stderr.startswith("store away\n")
