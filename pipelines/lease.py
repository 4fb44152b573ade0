"""A folder (a data set, a run) has one writer at a time: the holder of its newest lease.

    leases/NNNNNN.json      created once; the number is the fence that the holder's files carry
    leases/NNNNNN.beat      overwritten by the holder, again and again
    leases/NNNNNN.released  written by the holder when it is done

A lease is over when it was released, when its process is known to be gone, or when an observer
saw no beat for one period on the observer's own clock. Clocks are never compared. Whoever takes
over a lease that was not released also claims the next number in the log of versions, so that a
commit the old holder had prepared meets it and fails.
"""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dmd_core.files import is_local, store_errors, write_atomic
from pipelines.commits import (
    StoreError,
    check_create_only,
    create_once,
    delete_if_there,
    list_files,
    new_commit_id,
    read_json,
)
from pipelines.processes import is_gone, this_process
from pipelines.storage import Store

_NAME = re.compile(r"(\d{6})\.json")
_BEATS_PER_PERIOD = 5
_KEPT_LEASES = 10
_TAKEN_WHILE_STARTING = 20


class LeaseHeldError(RuntimeError):
    """Somebody else is writing; the message says who."""

    transient = True


class LeaseLostError(RuntimeError):
    """This process may write no longer: another one has taken over."""

    transient = True


class LeaseNotSeenError(LeaseLostError):
    """The folder that this process sees is not the one that its lease is in."""

    transient = False


class Lease:
    """A lease that is held. `check` before everything that must not be done by two."""

    def __init__(self, root: Store, fence: int, period_s: float, *, patient: bool = False) -> None:
        self.fence = fence
        self._root, self._period_s, self._patient = root, period_s, patient
        self._lost: str = ""
        self._beaten = time.monotonic()

    def check(self) -> None:
        """Raises `LeaseLostError` when another lease is newer, or none could be renewed."""
        try:
            check_fence(self._root, self.fence)
        except LeaseLostError as error:
            self._lost = str(error)
            raise
        if self._lost:
            raise LeaseLostError(_lost(self._root, self.fence, self._lost))

    @property
    def lost(self) -> bool:
        return bool(self._lost)

    def beat(self, count: int, progress: Callable[[], dict[str, Any]]) -> None:
        """Renew; notes that the lease is lost when it is."""
        try:
            self.check()
            content = {"count": count, **self._told(progress)}
            _write_json(self._root, _path(self._root, self.fence, "beat"), content)
            self._beaten = time.monotonic()
        except LeaseLostError:
            return
        except store_errors() as error:
            if not self._patient and time.monotonic() - self._beaten > self._period_s:
                self.give_up(f"it could not be renewed for {self._period_s:g} s: {error}")

    def give_up(self, reason: str) -> None:
        """From here on `check` refuses."""
        self._lost = self._lost or reason

    def _told(self, progress: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The progress, if it can be told: to renew is more important."""
        with contextlib.suppress(*store_errors()):
            return progress()
        return {}


@contextmanager
def hold_lease(
    root: Store,
    *,
    period_s: float,
    purpose: str,
    patient: bool = False,
    progress: Callable[[], dict[str, Any]] = dict,
    on_lost: Callable[[], None] | None = None,
    void_next: Callable[[Store, int, str], None] | None = None,
) -> Iterator[Lease]:
    """Hold the folder's lease for the length of the block.

    Waits up to one period to see whether another holder still lives; raises `LeaseHeldError` if it
    does. `progress` is written with every beat, for whoever asks who holds the lease. `on_lost` is
    called from the beating thread; where it interrupts the block by a `KeyboardInterrupt`, that
    becomes a `LeaseLostError`. `patient`: a store that
    does not answer is no reason to give up; for work whose every write looks at the fence itself.
    `void_next` claims the next version's number after a take-over.
    """
    fence, taken_over = _take(root, period_s, purpose)
    lease = Lease(root, fence, period_s, patient=patient)
    if taken_over and void_next is not None:
        void_next(root, fence, f"lease {fence - 1} was taken over")
    lease.beat(0, progress)
    stop = threading.Event()
    arguments = (lease, stop, period_s / _BEATS_PER_PERIOD, progress, on_lost)
    thread = threading.Thread(target=_beat_on, args=arguments, daemon=True)
    thread.start()
    try:
        yield lease
    except KeyboardInterrupt:
        lease.check()  # was it the lost lease that interrupted us?
        raise
    finally:
        stop.set()
        thread.join()
        # Not released, the lease ends by itself: no reason to call what was done a failure.
        with contextlib.suppress(*store_errors()):
            if not lease.lost:
                _write_json(root, _path(root, fence, "released"), {"fence": fence})
                _prune(root, fence)


def check_fence(root: Store, fence: int) -> None:
    """For those who work for the holder of lease `fence`, in other processes. Raises
    `LeaseLostError` when there is a newer one, `LeaseNotSeenError` when it cannot be seen."""
    newest = newest_fence(root)
    if newest < fence:
        raise LeaseNotSeenError(
            f"{root.url}: lease {fence} is not there, the newest is "
            f"{newest or 'none'}; is this the same folder on every node, and did nobody delete "
            "from it? A training on several machines needs a shared one, or s3://…"
        )
    if newest != fence:
        taker = _holder_in_words(root, newest)
        raise LeaseLostError(_lost(root, fence, f"lease {newest} was taken by {taker}"))


def newest_fence(root: Store) -> int:
    """The number of the newest lease; 0: there was none yet."""
    numbers = [
        int(match[1])
        for match in map(_NAME.fullmatch, list_files(root, root.path("leases")))
        if match
    ]
    return max(numbers, default=0)


def lease_status(root: Store) -> dict[str, Any] | None:
    """Who holds the lease, and the progress of its last beat; None: nobody.

    A holder that died without a word is shown until somebody takes over.
    """
    fence = newest_fence(root)
    record = read_json(root, _path(root, fence, "json")) if fence else None
    if record is None or read_json(root, _path(root, fence, "released")) is not None:
        return None
    return {**record, "progress": read_json(root, _path(root, fence, "beat")) or {}}


# ---------------------------------------------------------------- taking


def _take(root: Store, period_s: float, purpose: str) -> tuple[int, bool]:
    """(the new lease's number, was one taken over that nobody had released?)"""
    fence = newest_fence(root)
    if not fence or not is_local(root.fs):  # a folder may have been copied to a careless store
        check_create_only(root)
    taken_over = bool(fence) and _outlived(root, fence)
    record = {
        "commit_id": new_commit_id(),
        "fence": fence + 1,
        "period_s": period_s,
        "purpose": purpose,
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "holder": this_process(),
    }
    if not create_once(root, _path(root, fence + 1, "json"), record):
        raise LeaseHeldError(_held(root, fence + 1))
    return fence + 1, taken_over


def _outlived(root: Store, fence: int) -> bool:
    """False: the lease was released. True: its holder is gone. Raises while the holder lives."""
    record = read_json(root, _path(root, fence, "json")) or {}
    if read_json(root, _path(root, fence, "released")) is not None:
        return False
    if is_gone(record.get("holder", {})):
        return True
    period_s = float(record.get("period_s", _TAKEN_WHILE_STARTING))
    first, until = _beat_of(root, fence), time.monotonic() + period_s
    while time.monotonic() < until:
        time.sleep(min(0.5, period_s / 10))
        if read_json(root, _path(root, fence, "released")) is not None:
            return False
        if _beat_of(root, fence) != first or newest_fence(root) != fence:
            raise LeaseHeldError(_held(root, newest_fence(root)))
        if is_gone(record.get("holder", {})):
            return True
    return True


def _lost(root: Store, fence: int, why: str) -> str:
    return (
        f"{root.url}: this process has lost its lease {fence} ({why}); nothing more is written. "
        "Run the same command again to go on"
    )


def _held(root: Store, fence: int) -> str:
    record = read_json(root, _path(root, fence, "json")) or {}
    progress = read_json(root, _path(root, fence, "beat")) or {}
    shown = ", ".join(f"{key} {value}" for key, value in progress.items() if key != "count")
    return (
        f"{root.url} is being written by {_holder_in_words(root, fence)}: "
        f"{record.get('purpose', 'unknown')}, since {record.get('since', 'unknown')}"
        + (f" ({shown})" if shown else "")
        + ". Wait for it, or stop it and run the same command again"
    )


def _holder_in_words(root: Store, fence: int) -> str:
    record = read_json(root, _path(root, fence, "json")) or {}
    holder = record.get("holder", {})
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"


def _beat_of(root: Store, fence: int) -> dict[str, Any] | None:
    try:
        return read_json(root, _path(root, fence, "beat"))
    except StoreError:
        return None  # read in the middle of a write, on a store whose writes are not atomic


# ---------------------------------------------------------------- holding


def _beat_on(
    lease: Lease,
    stop: threading.Event,
    seconds: float,
    progress: Callable[[], dict[str, Any]],
    on_lost: Callable[[], None] | None,
) -> None:
    count = 0
    try:
        while not stop.wait(seconds) and not lease.lost:
            count += 1
            lease.beat(count, progress)
    finally:  # whatever ended the beats, nobody may go on without them
        if not stop.is_set():
            lease.give_up("its beats have ended")
            if on_lost is not None:
                on_lost()


def _prune(root: Store, fence: int) -> None:
    """Old leases say nothing any more; the newest few stay to be looked at."""
    for name in list_files(root, root.path("leases")):
        if name[:6].isdigit() and int(name[:6]) <= fence - _KEPT_LEASES:
            delete_if_there(root, root.path("leases", name))


def _path(root: Store, fence: int, kind: str) -> str:
    return root.path("leases", f"{fence:06d}.{kind}")


def _write_json(root: Store, path: str, content: dict[str, Any]) -> None:
    write_atomic(root.fs, path, json.dumps(content).encode())
