"""How workers tell the driver where they are: one tiny Ray actor that holds counters.

What is warned of in a log, a person at the driver should see: the warnings of a training's workers
come with the counters, the driver's own are passed on as they arise (`warnings_passed`).
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

_WARNINGS_KEPT, _SAME_WARNING_S = 50, 10.0
_LOGGERS = ("dmd_core", "pipelines", "jobs")  # our packages


@dataclass(frozen=True)
class DeviceFault:
    """The rows `pair_ids` were in one solve when a worker's device failed for this `reason`."""

    pair_ids: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Warned:
    """The `number`th warning of the work, counted from 1; `at`: seconds of the board's clock."""

    number: int
    text: str
    at: float


class Counters:
    """`done` counts up, as do rejects and busy seconds; `fields` holds the latest value of
    anything else a person may watch."""

    def __init__(self) -> None:
        self._done = 0
        self._fields: dict[str, Any] = {}
        self._failure: Exception | None = None
        self._device_faults: list[DeviceFault] = []
        self._warnings: deque[Warned] = deque(maxlen=_WARNINGS_KEPT)

    def advance(self, count: int, rejected: int = 0, busy_s: float = 0.0) -> None:
        """`busy_s`: seconds that a worker spent on these rows."""
        self._done += count
        for name, value in (("rejected", rejected), ("busy_s", busy_s)):
            if value:
                self._fields[name] = self._fields.get(name, 0) + value

    def set(self, done: int | None = None, **fields: Any) -> None:
        if done is not None:
            self._done = done
        self._fields.update(fields)

    def fail(self, error: Exception) -> None:
        """The work has ended with an error that trying again would not mend."""
        self._failure = self._failure or error

    def failure(self) -> Exception | None:
        return self._failure

    def note_device_fault(self, fault: DeviceFault) -> None:
        """The last word of a process whose device is lost, for the one after it."""
        self._device_faults.append(fault)

    def device_faults(self) -> list[DeviceFault]:
        return self._device_faults

    def warn(self, text: str) -> None:
        """What every worker says at once is one warning."""
        now = time.monotonic()
        if any(one.text == text and now - one.at < _SAME_WARNING_S for one in self._warnings):
            return
        number = self._warnings[-1].number + 1 if self._warnings else 1
        self._warnings.append(Warned(number, text, now))

    def warnings(self, after: int) -> list[Warned]:
        """Those later than number `after`, of the last few."""
        return [one for one in self._warnings if one.number > after]

    def read(self) -> tuple[int, dict[str, Any]]:
        return self._done, dict(self._fields)


ProgressBoard = ray.remote(num_cpus=0)(Counters)


@contextmanager
def warnings_passed(say: Callable[[str], object]) -> Iterator[None]:
    """In the block, `say` has the text of every warning that this process logs, beside its log."""
    handler = _Passing(say)
    with ExitStack() as leaving:
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(handler)
            leaving.callback(logging.getLogger(name).removeHandler, handler)
        yield


class _Passing(logging.Handler):
    def __init__(self, say: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        if logging.lastResort is not None and not logging.getLogger().handlers:
            logging.lastResort.handle(record)  # stderr: Python asks it where it finds no other
        try:
            self._say(record.getMessage())
        except (OSError, RayError, RuntimeError, TypeError, ValueError):
            self.handleError(record)  # whoever warns goes on


class Throttle:
    """True at most once in `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0

    def ready(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True
