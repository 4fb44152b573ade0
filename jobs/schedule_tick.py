"""What a scheduler does at a moment: submit what is due in a table to the clusters it names."""

import os
import socket
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cluster.nodes import ClusterError
from cluster.schedule import Entry, Job, ScheduleError, next_slot
from cluster.scheduler import Event, tick_entry
from cluster.submit import JobServer, SubmitError, is_sent, job_status, submit_job
from dmd_core.files import store_errors
from jobs.errors import JobError
from jobs.job_client import HOW_TO_NAME, connect, find_address
from jobs.schedule_table import ScheduleTable
from pipelines.commits import StoreError
from pipelines.storage import no_answer

POLL_S = 30.0  # how soon a standing scheduler sees an entry that somebody adds

NO_ADDRESS = f"no job server is named: {HOW_TO_NAME}"


class RayJobs:
    """The job server of each entry (cluster.scheduler.JobClient)."""

    def __init__(self, address: str | None) -> None:
        self.address = address

    def submit(self, entry: Entry, job: Job) -> bool:
        return submit_job(
            self._of(job),
            [entry.verb, *entry.arguments],
            submission_id=job.submission_id,
            working_dir=entry.working_dir,
            metadata={"schedule": entry.name},
        ).already

    def status(self, job: Job) -> str | None:
        return job_status(self._of(job), job.submission_id)

    def _of(self, job: Job) -> JobServer:
        address = job.address or self.address
        if address is None:
            raise SubmitError(NO_ADDRESS, transient=True)
        try:
            return connect(find_address(address))  # an earlier release took one without a scheme
        except (ClusterError, JobError) as error:  # of this machine: it is being started or ended
            raise SubmitError(str(error), transient=True) from error


@dataclass(frozen=True)
class Problem:
    """What is wrong with a single entry. `transient`: the next tick may do better."""

    text: str
    transient: bool = False


def tick(table: ScheduleTable, client: Any, now: datetime) -> tuple[list[Event], list[Problem]]:
    """(what was done, what is wrong with single entries): one entry never holds up another."""
    by = f"{socket.gethostname()}:{os.getpid()}"
    events, problems = [], []
    for entry in table.live():
        if isinstance(entry, ScheduleError):
            problems.append(Problem(str(entry)))
            continue
        lack = _lack(entry, client)
        if lack:  # another scheduler may do better, so nothing is claimed
            problems.append(Problem(f"schedule {entry.name}: {lack}"))
            continue
        try:
            event = tick_entry(entry, table, client, now=now, by=by)
            if event is not None:
                table.prune(entry.name)
        except (ScheduleError, StoreError, *store_errors()) as error:
            problems.append(Problem(f"schedule {entry.name}: {error}", no_answer(error)))
            continue
        if event is not None:
            events.append(event)
    return events, problems


def _lack(entry: Entry, client: Any) -> str:
    """Why this scheduler cannot submit the entry at all; "": it can."""
    if entry.address is None and getattr(client, "address", "") is None:
        return NO_ADDRESS
    if entry.address is not None:
        try:
            find_address(entry.address)
        except JobError as error:
            return str(error)
    folder = entry.working_dir
    if is_sent(folder) and not os.path.isdir(folder):
        return f"its working directory {folder} is not on this machine"
    return ""


def pause(table: ScheduleTable, now: datetime) -> float:
    slots = [next_slot(entry, now) for entry in table.live() if isinstance(entry, Entry)]
    waits = [(slot - now).total_seconds() for slot in slots if slot is not None]
    return max(0.5, min([POLL_S, *waits]))
