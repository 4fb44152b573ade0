"""One tick of a scheduler: claim what is due, submit it once, write down how it ended.

Order of writes, and what a crash after each leaves: the claim (found again after a grace period),
the submission (refused by Ray the second time), the result (nothing left to do).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Protocol

from cluster.schedule import (
    Claim,
    Entry,
    Job,
    Result,
    find_due,
    is_late,
    make_claim,
    slot_key,
)
from cluster.submit import ACTIVE, SecretError, SubmitError, TokenError


@dataclass(frozen=True)
class SlotState:
    """A claimed slot, and whether its result is written."""

    slot: datetime
    settled: bool


class Table(Protocol):
    """Where schedules are kept. `claim` and `settle` create a record only if there is none."""

    def removed(self, entry: Entry) -> bool: ...
    def slots(self, name: str) -> Sequence[SlotState]: ...  # newest first
    def claim(self, claim: Claim) -> bool: ...
    def settle(self, claim: Claim, result: Result) -> bool: ...
    def read_claim(self, name: str, slot: datetime) -> Claim | None: ...
    def read_result(self, name: str, slot: datetime) -> Result | None: ...
    def note_problem(self, claim: Claim, problem: str, now: datetime) -> None: ...


class JobClient(Protocol):
    """The job server. Both methods raise `SubmitError`."""

    def submit(self, entry: Entry, job: Job) -> bool: ...  # True: the job was there already
    def status(self, job: Job) -> str | None: ...


@dataclass(frozen=True)
class Event:
    """What a tick did with one slot. `outcome`: one of OUTCOMES, or "waiting": tried again.

    `stuck`: no try will do better until somebody mends something.
    """

    name: str
    slot: datetime
    outcome: str
    detail: str
    submission_id: str
    coalesced: int = 0
    stuck: bool = False


def tick_entry(
    entry: Entry, table: Table, client: JobClient, *, now: datetime, by: str, grace_s: float = 60
) -> Event | None:
    """Deal with the newest due slot of one entry, or with a claim that was left unfinished."""
    slots = table.slots(entry.name)
    due = find_due(entry, slots[0].slot if slots else None, now)
    if due is not None:
        claim = make_claim(entry, due, now, by)
        if not table.claim(claim):
            return None  # another scheduler is at it
        return _finish(entry, claim, slots, table, client, now)
    if not slots or slots[0].settled:
        return None
    claim = table.read_claim(entry.name, slots[0].slot)
    if claim is None or now - claim.claimed < timedelta(seconds=grace_s):
        return None
    return _finish(entry, claim, slots[1:], table, client, now)


def _finish(
    entry: Entry,
    claim: Claim,
    older: Sequence[SlotState],
    table: Table,
    client: JobClient,
    now: datetime,
) -> Event | None:
    try:
        last = _last_job(claim, older, table, client, now)
        result = _decide(entry, claim, last, table, client, now)
    except SubmitError as error:  # whether a job still runs is not known
        return _wait(claim, error, table, now)
    if result is None:
        if table.read_result(claim.name, claim.slot) is not None:
            return None  # whoever held this claim finished, or a newer slot took over
        try:
            already = client.submit(entry, claim.job)
        except SecretError as error:
            result = Result("failed", str(error), now, last)
        except SubmitError as error:
            # A wrong token is mended here, not in the job: the slot is not lost by it.
            if error.transient or isinstance(error, TokenError):
                return _wait(claim, error, table, now)
            result = Result("failed", str(error), now, last)
        else:
            detail = "the cluster had it already" if already else _not_looked_at(claim, last)
            result = Result("submitted", detail, now, claim.job)
    if not table.settle(claim, result):
        return None
    return _event(claim, result.outcome, result.detail)


def _decide(
    entry: Entry, claim: Claim, last: Job | None, table: Table, client: JobClient, now: datetime
) -> Result | None:
    """The result of a slot that is not to be submitted; None: go on."""
    if is_late(entry, claim.slot, now):
        hours = (now - claim.slot).total_seconds() / 3600
        return Result("missed", f"{hours:.1f} hours late", now, last)
    # A job of another cluster holds nothing up: that cluster may be gone for good.
    if last is not None and _same_cluster(claim, last) and client.status(last) in ACTIVE:
        return Result("skipped", f"still running: {last.submission_id}", now, last)
    # Asked last: a removal that came before this moment is kept.
    if claim.entry != entry.digest or table.removed(entry):
        return Result("removed", "", now, last)
    return None


def _same_cluster(claim: Claim, job: Job) -> bool:
    return job.address == claim.job.address


def _not_looked_at(claim: Claim, last: Job | None) -> str:
    """For the record: why a job was submitted whose predecessor may still run."""
    if last is None or _same_cluster(claim, last):
        return ""
    where = last.address or "the scheduler's own cluster"
    return f"not looked at, for it is on {where}: {last.submission_id}"


def _last_job(
    claim: Claim, older: Sequence[SlotState], table: Table, client: JobClient, now: datetime
) -> Job | None:
    """The newest job submitted before this slot; settles older claims that nobody finished."""
    unfinished: list[Claim] = []
    last: Job | None = None
    for state in older:
        result = table.read_result(claim.name, state.slot) if state.settled else None
        if result is not None:
            last = result.last_job
            break
        found = table.read_claim(claim.name, state.slot)
        if found is not None:
            unfinished.append(found)
    for left in reversed(unfinished):
        by = f"by {slot_key(claim.slot)}"
        if not _same_cluster(claim, left.job):
            result = Result("superseded", f"{by}; {_not_looked_at(claim, left.job)}", now, last)
        elif client.status(left.job) is None:
            result = Result("superseded", by, now, last)
        else:
            result = Result("submitted", "found on the cluster", now, left.job)
        if not table.settle(left, result):
            result = table.read_result(left.name, left.slot) or result
        last = result.last_job
    return last


def _wait(claim: Claim, error: SubmitError, table: Table, now: datetime) -> Event:
    """Leave the claim without a result: a later tick tries again, until a newer slot is due."""
    table.note_problem(claim, str(error), now)
    return replace(_event(claim, "waiting", str(error)), stuck=not error.transient)


def _event(claim: Claim, outcome: str, detail: str) -> Event:
    return Event(claim.name, claim.slot, outcome, detail, claim.job.submission_id, claim.coalesced)
