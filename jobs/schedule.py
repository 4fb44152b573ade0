"""`dmd schedule`: submit jobs to a Ray cluster at due times.

The table of schedules is a folder or a bucket prefix; any number of `dmd schedule run` and
`dmd schedule tick` may work on it at once.
"""

import argparse
import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn

from cluster.nodes import ClusterError
from cluster.schedule import Entry, ScheduleError, check_entry, slots_after
from cluster.submit import SecretError, SubmitError, is_sent, job_environment, refuse_secrets
from dmd_core.files import is_local, store_errors
from jobs.errors import Exit, JobError
from jobs.job_client import known_address
from jobs.job_door import VerbJob, relative_folders, without_program
from jobs.schedule_arguments import add_arguments
from jobs.schedule_show import (
    json_event,
    print_rows,
    show_event,
    show_job,
    show_next,
    show_record,
    show_time,
)
from jobs.schedule_table import ScheduleTable
from jobs.schedule_tick import POLL_S, Problem, RayJobs, pause, tick
from jobs.submit_order import read_sent
from pipelines.commits import StoreError
from pipelines.storage import no_answer, open_store

if TYPE_CHECKING:
    from jobs.session import Session

__all__ = ["add_arguments", "plan", "run"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

# ------------------------------------------------------------------------ actions


def run(session: "Session") -> dict[str, Any]:
    """Do what `session.arguments.action` says; returns the result for --json."""
    table = _table(session)
    arguments = session.arguments
    try:
        return _ACTIONS[arguments.action](session, table, arguments)
    except store_errors() as error:
        code = Exit.TRANSIENT if no_answer(error) else Exit.REFUSED
        raise JobError(f"{table.store.url}: {error}", code) from error


def plan(session: "Session") -> dict[str, Any]:
    """What `run` would do; changes nothing and asks no cluster."""
    table, arguments, now = _table(session), session.arguments, _now()
    if arguments.action == "add":
        entry, job = _new_entry(arguments, table, now)
        slots = islice(slots_after(entry.expression, entry.timezone, now), 3)
        times = {f"due_{index}": show_time(s, entry) for index, s in enumerate(slots, 1)}
        hints = {f"hint_{index}": hint for index, hint in enumerate(_hints(entry, job, table), 1)}
        shown = {"name": entry.name, "job": show_job(entry), "store": table.store.url}
        return shown | times | hints
    if arguments.action == "remove":
        return {"removes": arguments.name, "store": table.store.url}
    return {
        "store": table.store.url,
        "last_slots": {name: _key(table, name) for name in table.names()},
        "next": {e.name: show_next(e, now) for e in table.live() if isinstance(e, Entry)},
    }


def _add(session: "Session", table: ScheduleTable, arguments: argparse.Namespace) -> dict:
    now = _now()
    entry, job = _new_entry(arguments, table, now)
    table.add(entry)
    session.display.done(f"schedule {entry.name}: {show_job(entry)}")
    session.display.say(f"  next due {show_next(entry, now)}; submitted by `dmd schedule run`, or")
    session.display.say("  by `dmd schedule tick` from cron, systemd or Kubernetes")
    for hint in _hints(entry, job, table):
        session.display.say(f"  {hint}")
    return {"name": entry.name, "next": show_next(entry, now)}


def _list(session: "Session", table: ScheduleTable, arguments: argparse.Namespace) -> dict:
    now, rows = _now(), []
    for entry in table.live():
        if isinstance(entry, ScheduleError):
            session.display.say(f"error: {entry}")
            continue
        rows.append(
            {
                "name": entry.name,
                "expression": entry.expression,
                "next": show_next(entry, now),
                "job": show_job(entry),
                "address": entry.address or "the scheduler's",
            }
        )
    _print(session, rows, f"no schedules in {table.store.url}")
    return {"schedules": rows}


def _remove(session: "Session", table: ScheduleTable, arguments: argparse.Namespace) -> dict:
    if not table.remove(arguments.name, _now()):
        raise JobError(f"no schedule {arguments.name!r} in {table.store.url}; see the list")
    session.display.done(f"schedule {arguments.name}: removed; a job that runs goes on")
    return {"removed": arguments.name}


def _history(session: "Session", table: ScheduleTable, arguments: argparse.Namespace) -> dict:
    names = [arguments.name] if arguments.name else table.names()
    records = [record for name in names for record in table.history(name, arguments.limit)]
    records.sort(key=lambda record: (record.claim.slot, record.claim.name), reverse=True)
    rows = [show_record(record) for record in records[: arguments.limit]]
    _print(session, rows, f"no slot was due so far in {table.store.url}")
    return {"history": rows}


def _tick(session: "Session", table: ScheduleTable, arguments: argparse.Namespace) -> dict:
    client, broken = _client(arguments)
    events, problems = tick(table, client, _now())
    for event in events:
        session.display.say(show_event(event))
    problems = [*broken, *problems]
    wrong = [problem.text for problem in problems]
    left = [event for event in events if event.outcome in ("waiting", "failed")]
    if left:
        wrong.append(f"{len(left)} of {len(events)} due slots were not submitted")
    if wrong:
        failed = any(event.outcome == "failed" or event.stuck for event in left)
        again = not failed and all(problem.transient for problem in problems)
        raise JobError("; ".join(wrong), Exit.TRANSIENT if again else Exit.REFUSED)
    return {"events": [json_event(event) for event in events]}


def _stay(session: "Session", table: ScheduleTable, arguments: argparse.Namespace) -> NoReturn:
    """Tick for ever. Nothing is kept in memory but what was already said."""
    said: dict[str, str] = {}  # a cluster that is down is one line, not one a minute
    session.display.say(f"schedule: watching {table.store.url}; stop with Ctrl-C")
    while True:
        now = _now()
        try:
            client, broken = _client(arguments)  # a local cluster may come and go
            events, problems = tick(table, client, now)
            problems, wait = [*broken, *problems], pause(table, now)
        except (StoreError, *store_errors()) as error:
            events, problems, wait = [], [Problem(f"{table.store.url}: {error}")], POLL_S
        lines = {event.name: show_event(event) for event in events}
        lines |= (
            {"": f"error: {'; '.join(problem.text for problem in problems)}"} if problems else {}
        )
        for source, line in lines.items():
            if said.get(source) != line:
                session.display.say(line)
        said |= lines
        if not problems:
            said.pop("", None)
        _sleep(wait)


def _client(arguments: argparse.Namespace) -> tuple[RayJobs, list[Problem]]:
    """The job servers, and why that of this machine is not known: entries that name another one do
    without it."""
    try:
        return RayJobs(known_address(arguments.address)), []
    except ClusterError as error:
        return RayJobs(None), [Problem(str(error))]


_ACTIONS = {
    "add": _add,
    "list": _list,
    "remove": _remove,
    "history": _history,
    "tick": _tick,
    "run": _stay,
}


def _now() -> datetime:
    return datetime.now(UTC)


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


# ------------------------------------------------------------------------ at the door


def _table(session: "Session") -> ScheduleTable:
    return ScheduleTable(open_store(session.arguments.store, session.recipe.storage))


def _new_entry(
    arguments: argparse.Namespace, table: ScheduleTable, now: datetime
) -> tuple[Entry, VerbJob]:
    """The entry, checked as `dmd submit` checks its job, and that job."""
    verb, *rest = arguments.job
    folder = arguments.working_dir
    if is_sent(folder):
        folder = os.path.abspath(folder)
    try:
        refuse_secrets({"job": list(rest)})
        environment = job_environment(folder, None)
        job, _ = read_sent(verb, rest, environment, done="scheduled")
        entry = Entry(
            name=arguments.name or verb,
            generation=1,
            expression=" ".join(arguments.expression.split()),
            timezone=arguments.timezone,
            verb=verb,
            arguments=job.arguments,
            created=now,
            address=known_address(arguments.address) if arguments.address else None,
            working_dir=folder,
            max_late_s=None if arguments.max_late is None else _seconds(arguments.max_late),
        )
        check_entry(entry)
    except (ScheduleError, SecretError, SubmitError) as error:
        raise JobError(str(error), Exit.USAGE) from error
    return replace(entry, generation=table.next_generation(entry.name)), job


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None:
        raise JobError(f"--max-late {text!r}: expected a number with s, m, h or d", Exit.USAGE)
    return float(match.group(1)) * _UNITS[match.group(2)]


def _print(session: "Session", rows: list[dict[str, Any]], none: str) -> None:
    if session.arguments.json:
        return
    if rows:
        print_rows(rows)
    else:
        session.display.say(none)


def _key(table: ScheduleTable, name: str) -> str | None:
    slots = table.slots(name)
    return slots[0].slot.isoformat() if slots else None


def _hints(entry: Entry, job: VerbJob, table: ScheduleTable) -> Iterator[str]:
    """What works here and would not on a cluster, or from another machine."""
    recipe = job.options.config
    if entry.working_dir is None and recipe and recipe.endswith((".yaml", ".yml")):
        yield f"{recipe} must be found there on the cluster; --working-dir . sends this folder"
    if is_sent(entry.working_dir) and not is_local(table.store.fs):
        yield (
            f"{entry.working_dir} is a folder of this machine: a scheduler on another one leaves "
            "this job alone, unless it has such a folder too"
        )
    yield from without_program(entry.working_dir)
    if job.recipe is not None:
        yield from relative_folders(job.recipe)


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("schedule"))
