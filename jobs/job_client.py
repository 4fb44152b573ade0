"""What `submit`, `attach`, `jobs`, `logs` and `stop` share: the job server, and a job followed."""

import argparse
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.status import Status
from rich.text import Text

from cluster.follow import JobGoneError, follow, progress_title, without_old_progress
from cluster.job_server import ClusterJob, JobServer, SubmitError
from cluster.nodes import ClusterError
from cluster.record import ClusterRecord, default_folder, read_living, read_token
from cluster.secrets import SecretError, refuse_secrets
from jobs.display import Display
from jobs.errors import Exit, JobError
from jobs.job_door import VerbJob, with_config

_ENTRYPOINT = "python -m jobs."
_WEB = ("http://", "https://")
_JOB_SERVER, _CLUSTER = "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"  # the variables
HOW_TO_NAME = (
    "give --address http://head:8265, set RAY_API_SERVER_ADDRESS, or start a cluster on this "
    "machine with `dmd cluster up`"
)
# What Ray writes into a job's log before the verb says anything.
_OF_RAY = ("Running entrypoint for job ", " -- Runtime env is setting up.")
_SIGNAL = 128  # a shell's exit code of a command that a signal ended: this and the signal's number
# Of the metadata of a job: options of its submission, and two names of one recipe.
_PREFIX, _KEPT = "dmd-", ("working-dir", "runtime-env", "id")
_CALLED, _PLACE = "recipe", "recipe-place"
_OF_A_VERB = {"--config", "--recipe", "--set"}

# ------------------------------------------------------------------------ the job server


def add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="URL",
        help="job server, as in http://head:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, "
        "or the cluster of `dmd cluster up`)",
    )


def find_address(given: str | None) -> str:
    """The job server's URL: the given one, the environment's, the local cluster's."""
    address = known_address(given)
    if address is None:
        raise JobError(f"no job server is named: {HOW_TO_NAME}", Exit.USAGE)
    return address


def known_address(given: str | None) -> str | None:
    """As `find_address`; None: nothing names one."""
    if given:
        return _checked(given)
    named = _of_environment()
    local = None if named else read_living(default_folder())
    return local.url if local is not None else named


def connect(address: str) -> JobServer:
    """The job server there. The local cluster's gets its own token, whatever the environment says:
    Ray has read that when it was imported, and an old RAY_AUTH_TOKEN comes first for it."""
    local = _local_at(address)
    return JobServer(address) if local is None else JobServer(address, read_token(local))


def _local_at(address: str) -> ClusterRecord | None:
    """The local cluster, if that is its address. A record that cannot be read is no reason to
    refuse another one's."""
    try:
        local = read_living(default_folder())
    except ClusterError:
        return None
    return local if local is not None and local.url == address.rstrip("/") else None


def _of_environment() -> str | None:
    """Ray's variables. RAY_ADDRESS may name a cluster's own port, for drivers; then it is not
    meant."""
    server, cluster = (os.environ.get(name, "") for name in (_JOB_SERVER, _CLUSTER))
    if server:
        return _with_scheme(server, _JOB_SERVER)
    return cluster if cluster.startswith(_WEB) else None


def _checked(address: str) -> str:
    """A given address, which others may read in the list of processes: without a password."""
    try:
        refuse_secrets(address, "--address")
    except SecretError as error:
        raise JobError(str(error), Exit.USAGE) from error
    return _with_scheme(address, "--address")


def _with_scheme(address: str, source: str) -> str:
    address = (address if "://" in address else f"http://{address}").rstrip("/")
    if not address.startswith(_WEB):
        raise JobError(
            f"{source} {address}: expected the job server's, as in http://head:8265", Exit.USAGE
        )
    return address


@contextmanager
def in_words() -> Iterator[None]:
    """What the cluster refused or did not answer, as an error with its exit code."""
    try:
        yield
    except (SubmitError, JobGoneError) as error:
        raise JobError(str(error), Exit.TRANSIENT if error.transient else Exit.REFUSED) from error


def open_server(options: argparse.Namespace) -> JobServer:
    return connect(find_address(options.address))


def is_ours(job: ClusterJob) -> bool:
    return job.entrypoint.startswith(_ENTRYPOINT)


def kept_options(options: argparse.Namespace, job: VerbJob) -> dict[str, str]:
    """Of a submission, for the job's metadata: its own options as they were typed, but for the
    address, and where the recipe lay that has another name there. Anyone may read them."""
    given = {name: getattr(options, name.replace("-", "_")) for name in _KEPT}
    if given["working-dir"] == ".":
        del given["working-dir"]
    if job.file is not None and job.file != job.options.config:
        given |= {_CALLED: job.options.config, _PLACE: job.file}
    return {_PREFIX + name: value for name, value in given.items() if value}


def command_of(job: ClusterJob, server: JobServer) -> str:
    """`dmd submit pairs --config my.yaml`: goes on with the job, from the folder of the first."""
    verb, *arguments = shlex.split(job.entrypoint.removeprefix(_ENTRYPOINT)) or [""]
    kept = {name.removeprefix(_PREFIX): value for name, value in (job.metadata or {}).items()}
    if _CALLED in kept and _PLACE in kept:
        arguments = with_config(arguments, kept[_PLACE], kept[_CALLED])
    own = [word for name in _KEPT if name in kept for word in (f"--{name}", kept[name])]
    # What is not of every verb may be an option of `submit`, too.
    options = [word.partition("=")[0] for word in arguments if word.startswith("-")]
    apart = ["--"] if set(options) - _OF_A_VERB else []
    own += _address_of(server)
    return shlex.join(["dmd", "submit", verb.replace("_", "-"), *own, *apart, *arguments])


def _address_of(server: JobServer) -> list[str]:
    """As an option, unless commands without it go there anyway."""
    try:
        usual = known_address(None)
    except (JobError, ClusterError):
        usual = None
    return [] if usual == server.address else ["--address", server.shown]


def verb_of(job: ClusterJob) -> str:
    """The verb, or a foreign job's whole entrypoint."""
    if not is_ours(job):
        return job.entrypoint
    return job.entrypoint.removeprefix(_ENTRYPOINT).split(" ")[0].replace("_", "-")


def find_job(server: JobServer, submission_id: str) -> ClusterJob:
    job = server.job(submission_id)
    if job is None:
        raise JobError(
            f"the cluster at {server.shown} knows no job {submission_id}; `dmd jobs` lists them"
        )
    return job


# ------------------------------------------------------------------------ a job followed


class Shown:
    """A job's log as if the verb ran here (cluster.follow.Listener): on a terminal, progress is one
    live line. `past`: the job ran before, of whose progress only the last line is shown."""

    def __init__(self, display: Display, *, past: bool) -> None:
        self._display, self._past = display, past
        self._console = display.console
        self._live: Status | None = None

    def __enter__(self) -> "Shown":
        return self

    def __exit__(self, *error: object) -> None:
        self._end_progress()

    def state(self, job: ClusterJob) -> None:
        if job.status == "PENDING":
            self._display.say(f"{job.id} waits to be started")

    def lines(self, lines: list[str]) -> None:
        if self._past or self._console.is_terminal:
            lines = without_old_progress(lines)
        self._past = False
        for line in lines:
            if any(words in line for words in _OF_RAY):
                continue
            if self._console.is_terminal and progress_title(line):
                self._update(line)
            else:
                self._end_progress()
                self._console.print(Text.from_ansi(line), soft_wrap=True)

    def lost(self, reason: str) -> None:
        self._display.say(f"the connection is lost, the job goes on; trying again ({reason})")

    def back(self) -> None:
        self._display.say("the connection is back")

    def _update(self, line: str) -> None:
        if self._live is None:
            self._live = self._console.status("")
            self._live.start()
        self._live.update(Text(line))

    def _end_progress(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def follow_shown(
    server: JobServer, submission_id: str, display: Display, *, past: bool
) -> dict[str, Any]:
    """Show the job until it has ended; returns the result for --json, or raises `JobError` with the
    job's own exit code."""
    try:
        with Shown(display, past=past) as shown:
            job = follow(server, submission_id, shown, sleep=pause)
    except KeyboardInterrupt as error:
        raise JobError(
            f"{submission_id} goes on without this terminal; `dmd attach {submission_id}` follows "
            f"it again, `dmd stop {submission_id}` ends it",
            Exit.TRANSIENT,
        ) from error
    return result_of(server, job)


def result_of(server: JobServer, job: ClusterJob) -> dict[str, Any]:
    """Of an ended job: what --json shows, or `JobError` with its exit code."""
    found = {
        "id": job.id,
        "address": server.shown,
        "status": job.status,
        "exit_code": job.exit_code,
    }
    if job.status == "SUCCEEDED":
        return found
    again = f"`{command_of(job, server)}` goes on from there" if is_ours(job) else "submit it again"
    if job.status == "STOPPED":
        message = f"{job.id} was stopped; what was done stays, and {again}"
        raise JobError(message, Exit.TRANSIENT, result=found)
    raise JobError(f"{job.id} failed: {_reason(job)}; {again}", exit_code(job), result=found)


def exit_code(job: ClusterJob) -> Exit:
    """The verb's own; 4 for a job that did not end by itself (a lost node, a signal)."""
    code = job.exit_code
    if code is None:
        setup = job.error_type == "RUNTIME_ENV_SETUP_FAILURE"
        return Exit.REFUSED if setup else Exit.TRANSIENT
    if code < 0 or code > _SIGNAL:
        return Exit.TRANSIENT
    return Exit(code) if code in set(Exit) else Exit.BUG


def _reason(job: ClusterJob) -> str:
    if job.exit_code is None:
        return " ".join(job.message.split())[:500] or "the cluster does not say why"
    if job.exit_code < 0 or job.exit_code > _SIGNAL:
        return f"signal {abs(job.exit_code) % _SIGNAL} ended it"
    return f"exit code {job.exit_code} (the log above says why)"


def pause(seconds: float) -> None:
    time.sleep(seconds)
