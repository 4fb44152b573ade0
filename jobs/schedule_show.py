"""Schedules, due slots and their outcomes as lines for people and as JSON for machines."""

from dataclasses import asdict
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from cluster.schedule import Entry, next_slot
from cluster.scheduler import Event
from cluster.submit import entrypoint
from jobs.schedule_table import SlotRecord


def show_job(entry: Entry) -> str:
    return entrypoint([entry.verb, *entry.arguments]).removeprefix("python -m jobs.")


def show_next(entry: Entry, now: datetime) -> str:
    slot = next_slot(entry, now)
    return "never" if slot is None else show_time(slot, entry)


def show_time(slot: datetime, entry: Entry) -> str:
    return f"{slot.astimezone(ZoneInfo(entry.timezone)):%Y-%m-%d %H:%M} {entry.timezone}"


def show_event(event: Event) -> str:
    coalesced = f", {event.coalesced} missed before it" if event.coalesced else ""
    tail = f" ({event.detail})" if event.detail else ""
    return (
        f"{event.slot:%Y-%m-%d %H:%M} UTC  {event.name}: {event.outcome} "
        f"{event.submission_id}{coalesced}{tail}"
    )


def json_event(event: Event) -> dict[str, Any]:
    return asdict(event) | {"slot": event.slot.isoformat()}


def show_record(record: SlotRecord) -> dict[str, Any]:
    claim, result = record.claim, record.result
    detail = (record.problem or f"claimed by {claim.by}") if result is None else result.detail
    return {
        "slot": f"{claim.slot:%Y-%m-%d %H:%M} UTC",
        "name": claim.name,
        "outcome": "waiting" if result is None else result.outcome,
        "coalesced": claim.coalesced,
        "job": claim.job.submission_id,
        "detail": detail,
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A plain table on stdout, so that it can be piped."""
    columns = list(rows[0])
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    for line in cells:
        print("  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip())
