"""`dmd submit <verb> …`: the verb as a job of a Ray cluster, followed as if it ran here."""

import argparse
import importlib.metadata
from typing import Any

from cluster.job_server import ClusterJob, JobServer, SubmitError
from cluster.submit import Submitted, entrypoint, submit_job
from jobs.display import Display
from jobs.errors import JobError
from jobs.job_client import (
    add_address,
    find_address,
    follow_shown,
    in_words,
    open_server,
    pause,
    result_of,
)
from jobs.job_door import relative_folders, without_program
from jobs.submit_order import Order, read_order

_EXAMPLES = """examples:
  dmd submit pairs --config my.yaml --address http://head:8265
  dmd submit train --config my.yaml --no-wait      hand it over; `dmd attach` follows it
  dmd submit pairs --config my.yaml --dry-run      what would be sent, and how much
  dmd submit evaluate --config my.yaml -- --json   what stands behind -- is the verb's alone

The same command again follows the job while it runs; after a failure it goes on where that
stopped. Exit code: the job's own; 4 when the cluster does not answer."""

_KEY = "dmd-digest"
_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # between tries to hand a job over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    parser.usage = "dmd submit <verb> [its arguments] [options]"
    parser.add_argument("job", metavar="verb", help="the verb to run, before its arguments")
    add_address(parser)
    parser.add_argument(
        "--working-dir",
        metavar="DIR",
        default=".",
        help="folder or URI to send along (default: this folder); none: nothing is sent, package "
        "and recipe are on the cluster",
    )
    parser.add_argument(
        "--runtime-env", metavar="YAML", help="Ray runtime environment of the job, without secrets"
    )
    parser.add_argument("--id", help="submission id (default: of verb, arguments and recipe)")
    parser.add_argument("--no-wait", action="store_true", help="do not follow the job")
    parser.add_argument(
        "--again", action="store_true", help="run it once more although it has succeeded"
    )


@in_words()
def run(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    """Submit, unless the cluster has the job already, and follow it to its end."""
    order = read_order(options)
    server = open_server(options)
    _say_hints(order, display)
    _say_version(server, display)
    last, attempt = _attempts(server, order)
    if last is not None and _is_done(last, order, again=options.again):
        display.done(f"{last.id} has succeeded before; --again runs it once more")
        return result_of(server, last)
    started = False
    if last is None or not last.active:
        started = _send(server, order, attempt, display)
        last = None
    identity = attempt if last is None else last.id
    if not started:
        _say_running(server, order, identity, display)
    if options.no_wait:
        display.say(f"  `dmd attach {identity}` follows it, `dmd stop {identity}` ends it")
        return {"id": identity, "address": server.shown, "started": started}
    return follow_shown(server, identity, display, past=not started)


@in_words()
def plan(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    """What would be sent; asks no cluster."""
    order = read_order(options)
    _say_hints(order, display)
    try:
        address = find_address(options.address)
    except JobError as error:
        address = f"none: {error}"
    return {
        "id": order.id,
        "entrypoint": entrypoint(order.words),
        "working_directory": str(order.package or order.working_dir or "nothing is sent"),
        "address": address,
    }


# ------------------------------------------------------------------------ one job, many tries


def _attempts(server: JobServer, order: Order) -> tuple[ClusterJob | None, str]:
    """(the last attempt at this order, the id of the next). A cluster gives an id once, so two who
    start the same attempt at the same time start one job."""
    last, number = None, 1
    while (job := server.job(_attempt(order, number))) is not None:
        _refuse_other(job, order)
        last, number = job, number + 1
    return last, _attempt(order, number)


def _attempt(order: Order, number: int) -> str:
    return order.id if number == 1 else f"{order.id}-{number}"


def _is_done(job: ClusterJob, order: Order, *, again: bool) -> bool:
    return job.status == "SUCCEEDED" and not again and _same_code(job, order)


def _refuse_other(job: ClusterJob, order: Order) -> None:
    digest = (job.metadata or {}).get(_KEY)
    ours = entrypoint(order.words) == job.entrypoint if digest is None else digest == order.digest
    if not ours:
        raise JobError(f"the id {job.id} is taken by another command; choose another (--id)")


def _same_code(job: ClusterJob, order: Order) -> bool:
    """Was it sent with the working directory that would be sent now? A URI stands for what lies
    there."""
    now = order.working_dir if order.package is None else order.package.uri
    return job.package == now


def _send(server: JobServer, order: Order, identity: str, display: Display) -> bool:
    """Start the job; False: somebody was faster. A head node on its way up is waited for."""
    if order.package is not None:
        display.say(f"working directory: {order.package}")
    for wait in (*_WAITS_S, None):
        try:
            submitted = _submit(server, order, identity)
            break
        except SubmitError as error:
            if not error.transient or wait is None:
                raise
            if wait == _WAITS_S[0]:
                display.say(f"{error}; trying again")
            pause(wait)
    if not submitted.already:
        display.done(f"submitted {identity} to {server.shown}; Ctrl-C leaves it running")
    return not submitted.already


def _submit(server: JobServer, order: Order, identity: str) -> Submitted:
    return submit_job(
        server,
        order.words,
        submission_id=identity,
        working_dir=order.working_dir,
        runtime_env=order.runtime_env,
        metadata={_KEY: order.digest, **order.given},
    )


def _say_running(server: JobServer, order: Order, identity: str, display: Display) -> None:
    display.say(f"{identity} is on {server.shown} already")
    job = server.job(identity)
    if job is not None and not _same_code(job, order):
        display.say(
            "  with the working directory as it was then: it has changed since. "
            f"`dmd stop {identity}`, then the same command again, takes the changes"
        )


def _say_hints(order: Order, display: Display) -> None:
    hints = [*without_program(order.working_dir)]
    if order.job.recipe:
        hints += relative_folders(order.job.recipe)
    for hint in hints:
        display.say(f"  {hint}")


def _say_version(server: JobServer, display: Display) -> None:
    here = importlib.metadata.version("ray")
    if server.ray_version not in (None, here):
        display.say(f"  the cluster runs Ray {server.ray_version}, this machine {here}")


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("submit"))
