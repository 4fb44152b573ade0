"""`dmd attach [ID]`: follow a submitted job again after the terminal or connection was lost."""

import argparse
from typing import Any

from cluster.job_server import ClusterJob, JobServer
from jobs.display import Display
from jobs.errors import JobError
from jobs.job_client import add_address, find_job, follow_shown, in_words, is_ours, open_server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", nargs="?", help="submission id (default: the newest running job)")
    add_address(parser)


@in_words()
def run(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    """Show the job's log and what it says from now on; exit code: the job's own."""
    server = open_server(options)
    job = _job(server, options.id)
    display.say(f"{job.id} ({job.status}) on {server.shown}; Ctrl-C leaves it running")
    return follow_shown(server, job.id, display, past=True)


@in_words()
def plan(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    server = open_server(options)
    job = _job(server, options.id)
    return {"follows": job.id, "status": job.status, "address": server.shown}


def _job(server: JobServer, submission_id: str | None) -> ClusterJob:
    if submission_id is not None:
        return find_job(server, submission_id)
    ours = [job for job in server.jobs() if is_ours(job)]
    running = next((job for job in ours if job.active), None)
    if running is None:
        newest = f"; the newest, {ours[0].id}, is {ours[0].status}" if ours else ""
        raise JobError(f"no job runs on {server.shown}{newest}. `dmd jobs` lists them")
    return running


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("attach"))
