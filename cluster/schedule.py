"""When a scheduled job is due and what is done about it: pure logic; the clock is passed in.

Any number of schedulers may work on one table at once. A due slot belongs to the one that creates
its claim; the job's submission id follows from the claim, so that whoever finds a claim without a
result may submit it once more: Ray refuses the second.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

_FIELDS = ["minute", "hour", "day-of-month", "month", "day-of-week"]
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_SLOT = "%Y%m%dT%H%M%SZ"


class ScheduleError(ValueError):
    """A schedule that cannot be kept as it was asked for, or a record that is not one of ours."""


@dataclass(frozen=True)
class Entry:
    """A scheduled job: one verb of `dmd` with its arguments. Immutable once registered.

    `generation` counts the entries that carried this name; removal ends one for good.
    `address` and `working_dir` of None: what the scheduler that submits has.
    """

    name: str
    generation: int
    expression: str
    timezone: str
    verb: str
    arguments: tuple[str, ...]
    created: datetime
    address: str | None = None
    working_dir: str | None = None
    max_late_s: float | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(encode(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Job:
    """A job in Ray's table. `address` None: the scheduler's own cluster."""

    submission_id: str
    address: str | None = None


@dataclass(frozen=True)
class Claim:
    """Who took a slot and which job it is. `coalesced` older slots were missed with it."""

    name: str
    slot: datetime
    entry: str  # digest
    job: Job
    coalesced: int
    claimed: datetime
    by: str


@dataclass(frozen=True)
class Result:
    """How a slot ended. `last_job`: the newest job submitted for this name up to that slot."""

    outcome: str  # one of OUTCOMES
    detail: str
    at: datetime
    last_job: Job | None = None


OUTCOMES = {
    "submitted": "the cluster has the job",
    "skipped": "the previous job was still running",
    "missed": "later than the entry allows",
    "superseded": "not submitted before a newer slot was due",
    "failed": "the cluster refused the job",
    "removed": "the entry was removed in between",
}


@dataclass(frozen=True)
class Due:
    """The newest due slot and the number of older ones that were never claimed."""

    slot: datetime
    missed: int


# ------------------------------------------------------------------------ entries


def check_entry(entry: Entry) -> None:
    """Raise `ScheduleError` for a name, expression or time zone that cannot be kept."""
    if not _NAME.fullmatch(entry.name):
        raise ScheduleError(
            f"name {entry.name!r}: expected up to 40 lower-case letters, digits and hyphens"
        )
    if entry.max_late_s is not None and entry.max_late_s <= 0:
        raise ScheduleError(f"max late {entry.max_late_s} s: expected more than nothing")
    check_timezone(entry.timezone)
    check_expression(entry.expression)


def check_timezone(name: str) -> None:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ScheduleError(
            f"time zone {name!r} is not known; expected a name like Europe/Berlin or UTC"
        ) from error


def check_expression(expression: str) -> None:
    """Raise `ScheduleError` that names the field which is wrong."""
    fields = expression.split()
    if len(fields) != 5:
        raise ScheduleError(
            f"cron expression {expression!r} has {len(fields)} fields; expected five: "
            f"{' '.join(_FIELDS)}"
        )
    try:
        slots = CronSim(expression, datetime(2000, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        field = str(error).removeprefix("Bad ")
        raise ScheduleError(
            f"cron expression {expression!r}: {field} {fields[_FIELDS.index(field)]!r} is not "
            f"valid (the five fields are {' '.join(_FIELDS)})"
        ) from error
    if next(slots, None) is None:
        raise ScheduleError(f"cron expression {expression!r} is never due")


# ------------------------------------------------------------------------ slots


def slots_after(expression: str, timezone: str, after: datetime) -> Iterator[datetime]:
    """Due times later than `after`, ascending, in UTC; the same whatever `after` they start from.

    A fixed time that the clocks skip is due right after the gap; one that they show twice is due
    the first time. Expressions with a wildcard minute or hour follow the clock on the wall.
    """
    last = after
    for local in CronSim(expression, after.astimezone(ZoneInfo(timezone))):
        slot = local.astimezone(UTC)
        # Started inside the repeated hour, the library returns its first pass: the past.
        if slot > last:
            last = slot
            yield slot


def find_due(entry: Entry, claimed: datetime | None, now: datetime) -> Due | None:
    """The newest slot in (last claimed or registered, now]; older ones coalesce into it."""
    after = entry.created if claimed is None else max(entry.created, claimed)
    newest, count = None, 0
    for slot in slots_after(entry.expression, entry.timezone, after):
        if slot > now:
            break
        newest, count = slot, count + 1
    return None if newest is None else Due(newest, count - 1)


def next_slot(entry: Entry, now: datetime) -> datetime | None:
    start = max(now, entry.created)
    return next(slots_after(entry.expression, entry.timezone, start), None)


def is_late(entry: Entry, slot: datetime, now: datetime) -> bool:
    limit = entry.max_late_s
    return limit is not None and now - slot > timedelta(seconds=limit)


def make_claim(entry: Entry, due: Due, now: datetime, by: str) -> Claim:
    job = Job(f"dmd-{entry.name}-{slot_key(due.slot)}-{entry.digest[:8]}", entry.address)
    return Claim(entry.name, due.slot, entry.digest, job, due.missed, now, by)


def slot_key(slot: datetime) -> str:
    """A slot as part of file names and submission ids: 20260901T030000Z."""
    return slot.astimezone(UTC).strftime(_SLOT)


def parse_slot(key: str) -> datetime | None:
    try:
        return datetime.strptime(key, _SLOT).replace(tzinfo=UTC)
    except ValueError:
        return None


# ------------------------------------------------------------------------ records as JSON


def encode(record: Entry | Claim | Result) -> dict[str, Any]:
    return {key: _plain(value) for key, value in asdict(record).items()}


def decode_entry(content: dict[str, Any], path: str) -> Entry:
    with _naming(path):
        entry = Entry(**_times(content, "created"))
        entry = replace(entry, arguments=tuple(entry.arguments))
        check_entry(entry)
        return entry


def decode_claim(content: dict[str, Any], path: str) -> Claim:
    with _naming(path):
        fields = _times(content, "slot", "claimed")
        fields["job"] = Job(**fields["job"])
        return Claim(**fields)


def decode_result(content: dict[str, Any], path: str) -> Result:
    with _naming(path):
        fields = _times(content, "at")
        if fields["last_job"] is not None:
            fields["last_job"] = Job(**fields["last_job"])
        return Result(**fields)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    return list(value) if isinstance(value, tuple) else value


def _times(content: dict[str, Any], *keys: str) -> dict[str, Any]:
    times: dict[str, Any] = {key: datetime.fromisoformat(content[key]) for key in keys}
    return {key: value for key, value in (content | times).items() if key != "commit_id"}


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn what a foreign or damaged record raises into an error that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ScheduleError(f"{path} is not a record of a schedule: {error!r}") from error
