"""`dmd jobs`: the jobs of a Ray cluster with state, age and progress."""

import argparse
import time
from typing import Any

from cluster.follow import last_words
from cluster.job_server import ClusterJob, JobServer, SubmitError
from jobs.display import Display
from jobs.job_client import add_address, in_words, is_ours, open_server, verb_of
from jobs.schedule_show import print_rows

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))
_WIDTH = 100  # characters of what a job said last


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_address(parser)
    parser.add_argument("--all", action="store_true", help="also jobs that are not of dmd")
    parser.add_argument("--limit", type=int, default=20, help="jobs to show (default 20)")


@in_words()
def run(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    """The newest jobs, first those that run."""
    server = open_server(options)
    jobs = [job for job in server.jobs() if options.all or is_ours(job)]
    jobs.sort(key=lambda job: not job.active)  # stable: the newest first within each
    rows = [_row(server, job, _now()) for job in jobs[: options.limit]]
    if not options.json and rows:
        print_rows([row | {"age": _in_words(row["age"])} for row in rows])
    elif not rows:
        display.say(f"no jobs on {server.shown}")
    return {"address": server.shown, "jobs": rows}


plan = run  # it changes nothing


def _row(server: JobServer, job: ClusterJob, now: float) -> dict[str, Any]:
    return {
        "id": job.id,
        "verb": verb_of(job),
        "state": job.status,
        "age": round(now - (job.started_s or now)),
        "progress": _progress(server, job)[:_WIDTH],
    }


def _progress(server: JobServer, job: ClusterJob) -> str:
    """What the job said last; of an ended one only if it failed."""
    if not job.active:
        return "" if job.status == "SUCCEEDED" else last_words(job.message)
    try:
        return last_words(server.logs(job.id))
    except SubmitError:
        return "its log cannot be read at the moment"


def _in_words(seconds: int) -> str:
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _now() -> float:
    return time.time()


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("jobs"))
