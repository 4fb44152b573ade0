"""What ended a worker of Ray: one line for people, and the exit code.

What a worker raised comes back wrapped, and without its causes; only the traceback, as text, has
them all. So the text is read: it is a chain of parts, each with the line `class: message` of one
error, and classes and messages tell whether the same may succeed later.
"""

import errno
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jobs.errors import Exit
from jobs.failures import PACKAGES

# Between the parts of a traceback. What was being handled need not be a cause.
_CAUSE = "The above exception was the direct cause of the following exception:"
_HANDLING = "During handling of the above exception, another exception occurred:"
_ERROR = re.compile(r"(?P<kind>(?:(?:\w|<locals>)+\.)*\w+)(?:: (?P<message>.*))?")
# What Ray Data adds to the message of whatever ends a task.
_ADVICE = re.compile(r"\s*Failed to .+ after \d+/\d+ attempts \(total backoff .*")

# Ray's classes around what a task raised; those for a worker that ended, whatever its code did; and
# that for work in which nothing moved.
_WRAPPERS = ("UserCodeException", "RayDataUserCodeException", "SystemException")
_LOST = (
    "RayActorError", "ActorDiedError", "ActorUnavailableError", "WorkerCrashedError",
    "NodeDiedError", "LocalRayletDiedError", "OutOfMemoryError", "OwnerDiedError",
    "ObjectLostError", "ObjectFetchTimedOutError", "ObjectReconstructionFailedError",
    "StreamingGeneratorReplayInconsistentError",
    "WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError",
    "WorkerGroupStartupFailedError", "WorkerGroupStartupTimeoutError", "PreemptionError",
)  # fmt: skip
_STOOD_STILL = ("ExecutionTimeoutError",)

# What s3fs makes of a store's "not now" (503, 409) and of its 500; other replies keep their code.
_LATER = tuple(
    f"[Errno {getattr(errno, name)}]" for name in ("EBUSY", "EREMOTEIO") if hasattr(errno, name)
)
_REPLY = re.compile(r"An error occurred \((?P<code>\w+)\) when calling the ")
_STORE_CLIENTS = ("botocore", "aiohttp", "fsspec")


@dataclass(frozen=True)
class _Told:
    """One error of a chain. `kind`: its class, with the module but for Python's own."""

    kind: str
    message: str

    @property
    def package(self) -> str:
        return self.kind.split(".")[0]

    @property
    def class_(self) -> type[BaseException]:
        """`BaseException` where it cannot be found."""
        module, _, name = self.kind.rpartition(".")
        if self.package in _STORE_CLIENTS:
            importlib.import_module(module)
        found = getattr(sys.modules.get(module or "builtins"), name, None)
        return found if isinstance(found, type) else BaseException

    def is_ray(self, names: Sequence[str]) -> bool:
        return self.package == "ray" and self.kind.rsplit(".", 1)[-1] in names

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" if self.message else self.kind


def ray_errors() -> tuple[type[BaseException], ...]:
    """What Ray raises here for failures in its workers; nothing while Ray is not imported."""
    if "ray" not in sys.modules:
        return ()
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    return RayError, TrainingFailedError, ExecutionTimeoutError


def worker_failure(error: BaseException, log: str = "") -> tuple[str, Exit]:
    """The line that matters of an error that came back from a worker, and the exit code. `log`: the
    file that holds the rest; "": none does.

    Of several workers' errors, one that asks for something to be done counts most, then the loss of
    a worker or a store, from which the others' follow.
    """
    judged = [_judged(chain) for chain in _chains(error)]
    order = (Exit.REFUSED, Exit.TRANSIENT, Exit.BUG)
    message, code = min(judged, key=lambda found: order.index(found[1]))
    if code is Exit.BUG and log:
        message += f" (the whole story is in {log})"
    return message, code


def _judged(chain: Sequence[_Told]) -> tuple[str, Exit]:
    last = chain[-1]
    unanswered = any(map(_no_answer, chain))
    if last.package in PACKAGES:
        again = unanswered or getattr(last.class_, "transient", False)
        return last.message or last.kind, Exit.TRANSIENT if again else Exit.REFUSED
    if last.is_ray(_STOOD_STILL):
        return f"{last.message} Run the same command again to go on", Exit.TRANSIENT
    for told in chain:
        if told.is_ray(_LOST):
            line = f"a worker process or its node was lost ({told.message or told.kind}); "
            return f"{line}run the same command again to go on", Exit.TRANSIENT
    if unanswered:
        return f"a worker's store did not answer: {last}; try again", Exit.TRANSIENT
    if last.package in _STORE_CLIENTS:
        return f"a worker's store cannot be used: {last}", Exit.REFUSED
    if issubclass(last.class_, OSError):
        return last.message or last.kind, Exit.REFUSED
    return f"a worker failed: {last}", Exit.BUG


def _no_answer(told: _Told) -> bool:
    """As `pipelines.storage.no_answer`, of what an error says."""
    from pipelines.storage import is_not_now, transient_errors

    if any(number in told.message for number in _LATER):
        return True
    reply = _REPLY.search(told.message)
    if reply is not None:
        return is_not_now(reply["code"])
    return issubclass(told.class_, (*transient_errors(), TimeoutError, ConnectionError))


def _chains(error: BaseException) -> Iterator[list[_Told]]:
    """For each worker that failed, its error after what caused it. Ray Train sends the errors."""
    group = getattr(error, "worker_failures", None)
    inner = getattr(error, "controller_failure", None) or getattr(
        error, "health_check_failure", None
    )
    if group:
        for failure in group.values():
            yield from _chains(failure)
    elif inner is not None:
        yield from _chains(inner)
    else:
        yield _chain_of(str(error)) or [_told(_kind_of(error), str(error).splitlines())]


def _kind_of(error: BaseException) -> str:
    module = type(error).__module__
    return f"{'' if module == 'builtins' else f'{module}.'}{type(error).__qualname__}"


def _chain_of(text: str) -> list[_Told]:
    """Of a traceback; empty where `text` is none."""
    parts = text.rsplit(_HANDLING, 1)[-1].split(_CAUSE)
    chain = [told for part in parts if (told := _last_error(part.strip().splitlines()))]
    return [told for told in chain if not told.is_ray(_WRAPPERS)] or chain


def _last_error(lines: Sequence[str]) -> _Told | None:
    """The error's line is the first one after a frame, or after a header without frames."""
    before = " "
    found = None
    for number, line in enumerate(lines):
        after_frame = not before or before[0].isspace() or _is_header(before)
        match = _ERROR.fullmatch(line) if after_frame else None
        if match is not None and _is_class(match["kind"]):
            found = _told(match["kind"], [match["message"] or "", *lines[number + 1 :]])
        before = line
    return found


def _is_header(line: str) -> bool:
    return line.startswith("Traceback ") or "ray::" in line


def _is_class(kind: str) -> bool:
    return "." in kind or issubclass(_Told(kind, "").class_, Exception)


def _told(kind: str, lines: Sequence[str]) -> _Told:
    """With all of the message where it is ours, else with its first line."""
    text = _ADVICE.split("\n".join(lines), maxsplit=1)[0].strip()
    ours = kind.split(".")[0] in PACKAGES
    return _Told(kind, " ".join(text.split()) if ours else text.split("\n", 1)[0])
