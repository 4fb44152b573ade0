"""`dmd stop ID`: end a job of a Ray cluster; what it has done stays."""

import argparse
import time
from typing import Any

from cluster.job_server import ClusterJob, JobServer
from jobs.display import Display
from jobs.errors import Exit, JobError
from jobs.job_client import add_address, command_of, find_job, in_words, is_ours, open_server, pause

_PATIENCE_S = 60.0  # Ray kills what has not ended a few seconds after it was asked to
_POLL_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="submission id; `dmd jobs` lists them")
    add_address(parser)


@in_words()
def run(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    """Stop the job and wait until it has ended."""
    server = open_server(options)
    job = find_job(server, options.id)
    found = {"id": job.id, "address": server.shown}
    if not job.active:
        display.say(f"{job.id} has ended before: {job.status}")
        return found | {"status": job.status}
    server.stop(job.id)
    ended = _wait(server, job)
    display.done(f"{job.id} has ended ({ended.status}); what was done stays")
    if is_ours(job):
        display.say(f"  to go on: {command_of(job, server)}")
    return found | {"status": ended.status}


@in_words()
def plan(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    job = find_job(open_server(options), options.id)
    return {"stops": job.id, "status": job.status}


def _wait(server: JobServer, job: ClusterJob) -> ClusterJob:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        now = find_job(server, job.id)
        if not now.active:
            return now
        pause(_POLL_S)
    raise JobError(
        f"{job.id} was asked to stop and is {job.status} after {_PATIENCE_S:.0f} s; the same "
        "command asks again",
        Exit.TRANSIENT,
    )


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("stop"))
