"""Follow a job's log to its end over a connection that may come and go.

The job server gives a log as a whole and only adds to it, so what was already told is a number of
characters: nothing is lost or told twice, whatever happened to the connection in between.
"""

import re
from collections.abc import Callable
from typing import Protocol

from cluster.job_server import ClusterJob, JobServer, SubmitError

PATIENCE_S = 600.0  # a head node may be started anew, a laptop be carried home
_POLL_S = 1.0
_LONGEST_WAIT_S = 30.0
_CHARACTERS_PER_S = 200_000  # of log, at most: long logs are asked for less often
_TELL_AFTER = 2  # failures in a row: a single one is nothing to tell
_FINISHED_TRIES = 5  # to read the log of a job that has ended

# As jobs/display.py writes it to a log: `pairs: 24/120 3.1 pairs/s, 31 s left`.
_PROGRESS = re.compile(r"^([^:\n]{1,60}): \d+/\d+ ")


class JobGoneError(RuntimeError):
    """The cluster knows the job no more: its head was started anew. The job ended with it."""

    transient = True


class Listener(Protocol):
    """Who is told. `lines`: without line ends, each line of the log once. `state`: at first, and
    when the job's state has changed."""

    def state(self, job: ClusterJob) -> None: ...
    def lines(self, lines: list[str]) -> None: ...
    def lost(self, reason: str) -> None: ...
    def back(self) -> None: ...


def follow(
    server: JobServer,
    submission_id: str,
    listener: Listener,
    *,
    sleep: Callable[[float], None],
    patience_s: float = PATIENCE_S,
) -> ClusterJob:
    """Tell `listener` the job's log from its first line on until the job has ended; return the
    ended job. A server that does not answer is asked again, at growing intervals, for `patience_s`;
    then `SubmitError` is raised."""
    reader = _Reader(server, submission_id, listener)
    failures, away_s = 0, 0.0
    while True:
        try:
            job = reader.read()
        except SubmitError as error:
            if not error.transient or away_s >= patience_s:
                raise
            failures += 1
            if failures == _TELL_AFTER:
                listener.lost(str(error))
            wait = min(_POLL_S * 2 ** (failures - 1), _LONGEST_WAIT_S)
            away_s += wait
        else:
            if failures >= _TELL_AFTER:
                listener.back()
            failures, away_s, wait = 0, 0.0, reader.pause_s
            if not job.active:
                return job
        sleep(wait)


class _Reader:
    """The log so far: `told` characters of it."""

    def __init__(self, server: JobServer, submission_id: str, listener: Listener) -> None:
        self._server, self._id, self._listener = server, submission_id, listener
        self._told = self._length = self._unread = 0
        self._state = ""

    @property
    def pause_s(self) -> float:
        return max(_POLL_S, self._length / _CHARACTERS_PER_S)

    def read(self) -> ClusterJob:
        """Tell what is new. The state is asked for first: the log of an ended job is complete."""
        job = self._server.job(self._id)
        if job is None:
            raise JobGoneError(
                f"the cluster at {self._server.shown} knows no job {self._id} any more: its head "
                "node was started anew and the job ended with it. What was done is kept in the "
                "run's folder; submit the same command again to go on"
            )
        if job.status != self._state:
            self._state = job.status
            self._listener.state(job)
        try:
            text = self._server.logs(self._id)
        except SubmitError as error:
            self._unread += 1
            if job.active or self._unread < _FINISHED_TRIES:
                raise
            self._listener.lines([f"(the rest of the log cannot be read: {error})"])
            return job
        self._unread, self._length = 0, len(text)
        self._tell(text, whole=not job.active)
        return job

    def _tell(self, text: str, *, whole: bool) -> None:
        end = len(text) if whole else text.rfind("\n") + 1
        if end > self._told:
            self._listener.lines(text[self._told : end].removesuffix("\n").split("\n"))
            self._told = end


def progress_title(line: str) -> str | None:
    """`pairs` of `pairs: 24/120 3.1 pairs/s`; None: the line is not one of progress."""
    found = _PROGRESS.match(line)
    return found.group(1) if found else None


def without_old_progress(lines: list[str]) -> list[str]:
    """`lines` with only the last of each run of progress lines of one stage."""
    kept: list[str] = []
    for line in lines:
        title = progress_title(line)
        if title is not None and kept and progress_title(kept[-1]) == title:
            kept.pop()
        kept.append(line)
    return kept


def last_words(log: str) -> str:
    """The last line that tells how far a verb is, or the last line at all."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = (line for line in reversed(lines) if progress_title(line) or line.startswith("✓"))
    return next(telling, lines[-1] if lines else "")
