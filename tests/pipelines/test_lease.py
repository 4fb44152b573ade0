"""One writer at a time: real processes, killed and frozen, and a store in memory."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines import lease as module
from pipelines.lease import (
    LeaseHeldError,
    LeaseLostError,
    LeaseNotSeenError,
    check_fence,
    hold_lease,
    lease_status,
    newest_fence,
)
from pipelines.manifest import commit_manifest, list_versions, log_numbers, void_next_number
from pipelines.storage import open_store
from tests.pipelines.test_manifest import body

PERIOD_S = 1.0


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3_store")
    return open_store(str(tmp_path / "set"))


def hold(root, **changes):
    options = {"period_s": PERIOD_S, "purpose": "a test", "void_next": void_next_number}
    return hold_lease(root, **{**options, **changes})


def rewrite(root, fence, **changes):
    """The lease as if it were of another machine: nobody here can tell whether its holder lives."""
    path = root.path("leases", f"{fence:06d}.json")
    record = json.loads(root.fs.cat_file(path))
    record["holder"] |= {"boot": "another machine", **changes}
    root.fs.pipe_file(path, json.dumps(record).encode())


def test_a_released_lease_is_followed_by_the_next_at_once(root):
    for fence in (1, 2, 3):
        started = time.monotonic()
        with hold(root, period_s=60) as lease:
            assert lease.fence == newest_fence(root) == fence
            lease.check()
            assert lease_status(root)["purpose"] == "a test"
        assert time.monotonic() - started < 60
        assert lease_status(root) is None
    assert log_numbers(root) == []  # nothing was taken over


def test_of_many_at_once_one_gets_it_and_the_others_hear_who(root):
    refused = threading.Semaphore(0)

    def work(_):
        try:
            with hold(root, progress=lambda: {"phase": "generating"}) as lease:
                for _ in range(3):
                    assert refused.acquire(timeout=60)
                return lease.fence
        except LeaseHeldError as error:
            refused.release()
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    winners = [result for result in results if isinstance(result, int)]
    assert winners == [1]
    for message in results:
        if isinstance(message, str):
            assert f"process {os.getpid()} on" in message and "a test" in message


def test_a_holder_elsewhere_that_beats_keeps_the_lease(root):
    with hold(root, progress=lambda: {"phase": "generating", "rows": "3 of 9"}):
        rewrite(root, 1)
        with pytest.raises(LeaseHeldError, match=r"phase generating, rows 3 of 9"), hold(root):
            pass
    assert newest_fence(root) == 1


def test_a_holder_elsewhere_without_a_beat_is_followed_after_a_period(root):
    with hold(root, period_s=3600) as old:  # its next beat comes in twelve minutes
        rewrite(root, 1)
        path = root.path("leases", "000001.json")
        record = json.loads(root.fs.cat_file(path))
        root.fs.pipe_file(path, json.dumps({**record, "period_s": PERIOD_S}).encode())
        prepared = log_numbers(root)
        started = time.monotonic()
        with hold(root) as lease:
            assert time.monotonic() - started >= PERIOD_S
            assert lease.fence == 2
            with pytest.raises(LeaseLostError, match=r"lease 2 was taken by process"):
                old.check()
            with pytest.raises(LeaseLostError):
                commit_manifest(root, body(), old)
            assert commit_manifest(root, body(), lease).version == 2
    # The old holder's number is void, and its end is not recorded as a release.
    assert prepared == [] and log_numbers(root) == [1, 2] and list_versions(root) == [2]
    assert not root.fs.exists(root.path("leases", "000001.released"))
    assert root.fs.exists(root.path("leases", "000002.released"))


def test_a_commit_prepared_before_a_take_over_meets_a_void_number(root, monkeypatch):
    """The worst moment to freeze: after the look at the lease, before the create."""
    with hold(root, period_s=3600) as old:
        looked = old.check

        def look_then_freeze():
            looked()
            monkeypatch.setattr(old, "check", looked)
            rewrite(root, 1)
            monkeypatch.setattr(module, "is_gone", lambda process: True)
            with hold(root) as new:
                commit_manifest(root, body(prompts_digest="new"), new)

        monkeypatch.setattr(old, "check", look_then_freeze)
        with pytest.raises(LeaseLostError):
            commit_manifest(root, body(prompts_digest="old"), old)
    assert list_versions(root) == [2]


def test_the_holder_hears_that_it_has_lost_the_lease(tmp_path):
    root, lost = open_store(str(tmp_path / "set")), threading.Event()
    with hold(root, on_lost=lost.set) as lease:
        record = json.loads(root.fs.cat_file(root.path("leases", "000001.json")))
        root.fs.pipe_file(root.path("leases", "000002.json"), json.dumps(record).encode())
        assert lost.wait(10)
        assert lease.lost


def test_a_lease_that_cannot_be_renewed_is_lost_after_a_period(tmp_path, monkeypatch):
    root, lost = open_store(str(tmp_path / "set")), threading.Event()
    with hold(root, on_lost=lost.set):

        def refuse(*_):
            raise OSError("no route to host")

        started = time.monotonic()
        monkeypatch.setattr(module, "_write_json", refuse)
        assert lost.wait(10) and time.monotonic() - started > PERIOD_S / 2
        monkeypatch.undo()


def test_a_patient_holder_outlasts_a_store_that_is_away(tmp_path, monkeypatch):
    root, lost, asked = open_store(str(tmp_path / "set")), threading.Event(), threading.Semaphore(0)
    with hold(root, patient=True, on_lost=lost.set) as lease:

        def refuse(*_):
            asked.release()
            raise OSError("no route to host")

        monkeypatch.setattr(module, "_write_json", refuse)
        for _ in range(8):  # five of them are a period
            assert asked.acquire(timeout=10)
        monkeypatch.undo()
        lease.check()
    assert not lost.is_set()


def test_progress_that_cannot_be_told_does_not_end_the_beats(tmp_path):
    """It is written into the same store: one failed request must not cost the lease."""
    root, told = open_store(str(tmp_path / "set")), threading.Semaphore(0)

    def fail():
        told.release()
        raise OSError("503 SlowDown")

    with hold(root, progress=fail) as lease:
        for _ in range(4):
            assert told.acquire(timeout=10)
        lease.check()
        assert lease_status(root)["progress"]["count"] >= 2


def test_without_beats_nobody_goes_on(tmp_path):
    root, lost = open_store(str(tmp_path / "set")), threading.Event()
    calls = []

    def break_down():
        calls.append(1)
        if len(calls) > 1:
            raise ZeroDivisionError("a bug")
        return {}

    with hold(root, progress=break_down, on_lost=lost.set) as lease:
        assert lost.wait(10)
        with pytest.raises(LeaseLostError, match="its beats have ended"):
            lease.check()


def test_a_release_that_fails_is_no_failure_of_the_work(tmp_path, monkeypatch):
    root = open_store(str(tmp_path / "set"))

    def refuse(*_):
        raise OSError("503 SlowDown")

    with hold(root):
        monkeypatch.setattr(module, "_write_json", refuse)
    monkeypatch.undo()
    assert newest_fence(root) == 1 and lease_status(root) is not None


def test_old_leases_are_forgotten_and_numbers_are_not_reused(tmp_path):
    root = open_store(str(tmp_path / "set"))
    for _ in range(15):
        with hold(root):
            pass
    names = {path.name[:6] for path in Path(root.path("leases")).iterdir()}
    assert min(names) == "000006" and newest_fence(root) == 15


HOLDER = """
import sys, time
from pipelines.lease import hold_lease
from pipelines.storage import open_store
with hold_lease(open_store(sys.argv[1]), period_s=float(sys.argv[2]), purpose="holder") as lease:
    print("holding", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lease of tmp_path/set, with the given period."""
    running = []

    def start(period_s):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "set"), str(period_s)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        running.append(process)
        assert process.stdout.readline() == "holding\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_a_lease_that_cannot_be_seen_was_not_taken(root, tmp_path):
    """As on a node whose disk is another one than the holder's."""
    with hold(root) as lease, pytest.raises(LeaseNotSeenError, match="the same folder on every"):
        check_fence(open_store(str(tmp_path / "another")), lease.fence)
    assert not LeaseNotSeenError.transient  # the same command again would see no more


def test_the_lease_of_a_killed_process_of_this_machine_is_free_at_once(tmp_path, holder):
    process = holder(3600)
    process.send_signal(signal.SIGKILL)
    # Not waited for: a dead process that nobody has buried yet.
    started = time.monotonic()
    with hold(open_store(str(tmp_path / "set"))) as lease:
        assert lease.fence == 2 and time.monotonic() - started < 30


def test_a_frozen_process_loses_the_lease_after_a_period(tmp_path, holder):
    process = holder(PERIOD_S)
    process.send_signal(signal.SIGSTOP)
    with hold(open_store(str(tmp_path / "set"))) as lease:
        assert lease.fence == 2
        process.send_signal(signal.SIGCONT)
        time.sleep(2 * PERIOD_S / 5)
        lease.check()  # the old holder, awake again, does not take it back
