"""`dmd logs ID`: what a job of a Ray cluster has said, on stdout."""

import argparse
import sys
from typing import Any

from cluster.follow import follow
from cluster.job_server import ClusterJob, JobServer
from jobs.display import Display
from jobs.errors import JobError
from jobs.job_client import add_address, find_job, in_words, open_server, pause, result_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="submission id; `dmd jobs` lists them")
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the job has ended")
    add_address(parser)


@in_words()
def run(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    """Print the log; with --follow until the end, and then with the job's own exit code, which
    stands in the JSON too."""
    server = open_server(options)
    job = find_job(server, options.id)
    if options.follow:
        heard = _Heard(display, printed=not options.json)
        ended = follow(server, job.id, heard, sleep=pause)
        return _with_log(server, ended, heard.log)
    log = server.logs(job.id)
    if not options.json:
        sys.stdout.write(log)
    return {"id": job.id, "status": job.status, "log": log}


@in_words()
def plan(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    job = find_job(open_server(options), options.id)
    return {"prints the log of": job.id, "status": job.status}


def _with_log(server: JobServer, job: ClusterJob, log: str) -> dict[str, Any]:
    """The ended job's result, or the `JobError` with its exit code; the log in either."""
    try:
        return result_of(server, job) | {"log": log}
    except JobError as error:
        error.result = (error.result or {}) | {"log": log}
        raise


class _Heard:
    """A job's log (cluster.follow.Listener): alone on stdout, the connection's state beside it; or,
    not `printed`, kept whole in `log`, for JSON."""

    def __init__(self, display: Display, *, printed: bool) -> None:
        self._display, self._printed = display, printed
        self.log = ""

    def state(self, job: ClusterJob) -> None: ...

    def lines(self, lines: list[str]) -> None:
        if self._printed:
            print(*lines, sep="\n", flush=True)
        else:
            self.log += "".join(f"{line}\n" for line in lines)

    def lost(self, reason: str) -> None:
        self._display.say(f"the connection is lost; trying again ({reason})")

    def back(self) -> None:
        self._display.say("the connection is back")


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("logs"))
