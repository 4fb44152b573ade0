"""How workers tell the driver where they are: one tiny Ray actor that holds counters."""

import time
from dataclasses import dataclass
from typing import Any

import ray


@dataclass(frozen=True)
class DeviceFault:
    """The rows `pair_ids` were in one solve when a worker's device failed for this `reason`."""

    pair_ids: tuple[int, ...]
    reason: str


class Counters:
    """`done` counts up, as do rejects and busy seconds; `fields` holds the latest value of
    anything else a person may watch."""

    def __init__(self) -> None:
        self._done = 0
        self._fields: dict[str, Any] = {}
        self._failure: Exception | None = None
        self._device_faults: list[DeviceFault] = []

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

    def read(self) -> tuple[int, dict[str, Any]]:
        return self._done, dict(self._fields)


ProgressBoard = ray.remote(num_cpus=0)(Counters)


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
