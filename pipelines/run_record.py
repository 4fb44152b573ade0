"""What one writer of a data set does and spends, kept beside the generation it makes."""

import contextlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from dmd_core.files import store_errors, write_atomic
from pipelines.bounded import map_bounded
from pipelines.commits import StoreError, list_files, read_json
from pipelines.storage import Store

_NAME = re.compile(r"\d{6,}\.json")
_READERS = 16  # small files: the store's response time counts, not its bandwidth


@dataclass(frozen=True)
class Cost:
    """What `runs` of one generation took together, each up to its last beat.

    `busy_s`: seconds that teachers computed, added up over all teachers. `gpu_s`: those on GPUs,
    times the GPUs that a teacher had (`gpus_per_actor`). The compiling of a first batch
    (`pairs.compile`) is in both; loading, starting and waiting are in neither. `cpu_s`: those of
    `busy_s` without a GPU. `seconds`: from start to end of the runs.
    """

    runs: int = 0
    gpu_s: float = 0.0
    cpu_s: float = 0.0
    busy_s: float = 0.0
    seconds: float = 0.0

    @staticmethod
    def of(records: Iterable[Mapping[str, Any]]) -> "Cost":
        """The sum over run records; what an older one does not say counts nothing."""
        found = list(records)
        return Cost(
            runs=len(found),
            gpu_s=_sum(found, "gpu_s"),
            cpu_s=_sum((record for record in found if not record.get("gpu_s")), "busy_s"),
            busy_s=_sum(found, "busy_s"),
            seconds=_sum(found, "seconds"),
        )

    def plus(self, record: Mapping[str, Any]) -> "Cost":
        """With one more run; an empty record is none."""
        more = Cost.of([record] if record else [])
        both = zip(astuple(self), astuple(more), strict=True)
        return Cost(*(before + now for before, now in both))


def _sum(records: Iterable[Mapping[str, Any]], name: str) -> float:
    return round(float(sum(record.get(name) or 0 for record in records)), 2)


def generation_cost(root: Store, generation: str) -> Cost:
    """What the runs of the folder `generation` have cost so far.

    A record that cannot be read counts nothing: `dmd inspect` names it.
    """
    folder = root.path(generation, "runs")
    paths = [f"{folder}/{name}" for name in list_files(root, folder) if is_run_record(name)]
    return Cost.of(filter(None, map_bounded(lambda path: _readable(root, path), paths, _READERS)))


def is_run_record(name: str) -> bool:
    """Of a file in a generation's folder runs/: others lie there where a process was killed."""
    return _NAME.fullmatch(name) is not None


def _readable(root: Store, path: str) -> dict[str, Any] | None:
    with contextlib.suppress(StoreError):
        return read_json(root, path)
    return None


class RunRecord:
    """`generations/<fingerprint>/runs/<fence>.json`, rewritten with every beat of the lease.

    `rows` were handled by a teacher in this run, `rejected` of them without a usable pair: as the
    workers count while it runs, as the sealed version says at its end. `busy_s`, `gpu_s` and
    `seconds`: see `Cost`.
    """

    def __init__(self, root: Store, generation: str, *, gpus_per_actor: float) -> None:
        self.phase = "landing"
        self.spent: dict[str, Any] = {}
        self._root, self._generation, self._gpus = root, generation, gpus_per_actor
        self._fence, self._stored = 0, 0
        self._board: Any = None
        self._last: tuple[int, dict[str, Any]] = (0, {})
        self._total = 0
        self._sealed: tuple[int, int] | None = None
        self._clock = time.monotonic()
        self._started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def begin(self, fence: int, total: int, stored: int, board: Any) -> None:
        """From here on the run's own numbers are read from `board`, where `stored` rows count as
        done already."""
        self._fence, self._total, self._stored, self._board = fence, total, stored, board
        self._last = (stored, {})

    def finish(self, rows: int, rejected: int) -> None:
        """The last state, with what was sealed: Ray repeats a block whose worker died, and then
        its rows are counted twice. That a store fails just now must not undo what was sealed."""
        self._sealed = rows, rejected
        with contextlib.suppress(*store_errors()):
            self.progress()

    def progress(self) -> dict[str, Any]:
        """For whoever asks who holds the lease; writes the record as well."""
        if self._board is None:
            return {"phase": self.phase}
        done, fields = self._read()
        done, rejected = min(done, self._total), fields.get("rejected", 0)
        if self._sealed is not None:
            done, rejected = sum(self._sealed), self._sealed[1]
        self.spent = {
            "fence": self._fence,
            "started": self._started,
            "seconds": round(time.monotonic() - self._clock, 1),
            "rows": max(0, done - self._stored),
            "rejected": min(rejected, self._total),
            "busy_s": round(fields.get("busy_s", 0.0), 2),
            "gpu_s": round(fields.get("busy_s", 0.0) * self._gpus, 2),
        }
        path = self._root.path(self._generation, "runs", f"{self._fence:06d}.json")
        write_atomic(self._root.fs, path, json.dumps(self.spent).encode())
        return {"phase": self.phase, "rows": f"{done} of {self._total}"}

    def _read(self) -> tuple[int, dict[str, Any]]:
        import ray
        from ray.exceptions import RayError

        if ray.is_initialized():
            with contextlib.suppress(RayError):  # a lost board must not end the work
                self._last = ray.get(self._board.read.remote(), timeout=5)
        return self._last
