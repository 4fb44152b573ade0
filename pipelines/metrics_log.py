"""Training metrics as JSON lines, without gaps or double steps across interruptions."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from dmd_core.files import write_atomic
from pipelines.storage import Store
from pipelines.trackers import Tracker


class _Line(NamedTuple):
    """As it is on the store: a week of fast steps is a million lines, and as dictionaries they
    would take many times the room."""

    step: int
    content: bytes


class MetricsLog:
    """The JSON lines of a run, one line per logged step, and the same numbers to `trackers`.

    An object store has no append, so the file is rewritten whole (some megabytes for a long run,
    160 for a week of fast steps); `flush` decides when. Lines after `resume_step` belong to work
    that was lost, and go.
    """

    def __init__(
        self,
        store: Store,
        name: str = "metrics.jsonl",
        *,
        resume_step: int,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._store, self._path = store, store.path(name)
        self._lines = [line for line in self._read() if line.step <= resume_step]
        self._written = False  # are the lines on the store as they are here?
        self._trackers = list(trackers)

    @property
    def lines(self) -> Sequence[Mapping[str, Any]]:
        """Oldest first, as they are on the store: None for what was not finite. Decoded anew."""
        return tuple(json.loads(line.content) for line in self._lines)

    def append(self, record: Mapping[str, Any]) -> None:
        """`record` holds an int `step` and numbers; one that is not finite is written as null,
        for JSON has no other word for it."""
        line = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self._lines.append(_Line(record["step"], json.dumps(line).encode() + b"\n"))
        self._written = False
        shown = {f"train/{k}": v for k, v in line.items() if k != "step" and v is not None}
        self.add_scalars(record["step"], shown)

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """To the trackers alone: finite numbers by tag."""
        for tracker in self._trackers:
            tracker.scalars(step, values)

    def add_picture(self, tag: str, step: int, picture: np.ndarray) -> None:
        """`picture`: (H,W,3) uint8."""
        for tracker in self._trackers:
            tracker.picture(tag, step, picture)

    def rewind(self, step: int) -> None:
        """The run goes on from `step`: later lines go, here and where a tracker can."""
        self._lines = [line for line in self._lines if line.step <= step]
        self._written = False
        for tracker in self._trackers:
            tracker.rewind(step)

    def flush(self) -> None:
        """Afterwards every line is on the store. Without new ones nothing is written."""
        if not self._written:
            content = b"".join(line.content for line in self._lines)
            write_atomic(self._store.fs, self._path, content)
            self._written = True
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Ends the trackers, each whatever another raises; the lines are the caller's to flush
        before."""
        with ExitStack() as closing:
            for tracker in self._trackers:
                closing.callback(tracker.close)

    def _read(self) -> list[_Line]:
        if not self._store.fs.exists(self._path):
            return []
        found: Any = self._store.fs.cat_file(self._path)
        return [_Line(json.loads(line)["step"], line + b"\n") for line in found.splitlines()]
