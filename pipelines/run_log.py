"""What a run says of itself as it goes: metrics.jsonl, trackers, samples/step_*.png."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dmd_core.files import store_errors, write_atomic
from pipelines.commits import delete_if_there
from pipelines.fence import Fence
from pipelines.metrics_log import MetricsLog
from pipelines.patience import insist
from pipelines.plots import picture_grid
from pipelines.sample_files import SAMPLES, sample_files, sample_path
from pipelines.storage import Store
from pipelines.trackers import Tracker, TrackerName, open_trackers
from pipelines.workers import Group

_FLUSH_S, _LONGEST_S = 10.0, 300.0
# Times as long as a flush took: training waits for it, and it takes longer as the run grows.
_PAUSE = 100
_logger = logging.getLogger(__name__)


class RunLog:
    """Every worker has one; rank 0's writes. `step`: the run goes on after it.

    Nothing is written once another process has taken over the run's folder. A store that is away
    costs a warning, not the training: lines wait in memory for the next flush, pictures are made
    again, or left where they should go (the report shows none after the last line). `surely`: they
    must be there, for the run ends: a store that is away is waited for.
    """

    def __init__(
        self,
        store: Store,
        group: Group,
        fence: Fence,
        report_to: TrackerName | Sequence[TrackerName],
        step: int,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._store, self._writes, self._fence = store, group.rank == 0, fence
        trackers: Sequence[Tracker] = ()
        if self._writes:
            trackers = open_trackers(report_to, store, resume_step=step, settings=settings)
        self._log = MetricsLog(store, resume_step=step, trackers=trackers)
        self._due = 0.0  # when lines are written next, if no save does so before
        self._drop_pictures_after(step)

    @property
    def lines(self) -> Sequence[Mapping[str, Any]]:
        """As `MetricsLog.lines`."""
        return self._log.lines

    def append(self, line: Mapping[str, Any]) -> None:
        with _warned("curves", "written"):  # the line itself waits in memory
            self._log.append(line)
        if time.monotonic() >= self._due:
            self.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """To the trackers alone."""
        with _warned("curves", "written"):
            self._log.add_scalars(step, values)

    def pictures(self, step: int, rows: Sequence[np.ndarray], *, surely: bool = False) -> None:
        """`rows`: the teacher's above, the student's below, each (N,H,W,3) uint8."""
        if not self._writes or not self._fence.holds():
            return
        path = sample_path(self._store, step)
        grid = picture_grid(rows)
        _write(
            lambda: write_atomic(self._store.fs, path, grid),
            f"sample pictures of step {step}",
            surely,
        )
        with _warned(f"sample pictures of step {step}", "tracked"):
            self._log.add_picture(SAMPLES, step, np.concatenate(rows[1], axis=1))

    def flush(self, *, surely: bool = False) -> None:
        """Before every save: a run goes on with the lines up to its checkpoint."""
        started = time.monotonic()
        if self._writes and self._fence.holds():
            _write(self._log.flush, "metrics", surely)
        ended = time.monotonic()
        # One that waited for a store says nothing of the next.
        self._due = ended + min(max(_FLUSH_S, _PAUSE * (ended - started)), _LONGEST_S)

    def rewind(self, step: int) -> None:
        """Forget what came after `step`."""
        with _warned("curves", "written"):
            self._log.rewind(step)
        self._drop_pictures_after(step)

    def close(self) -> None:
        self.flush()  # what led to an error can be seen
        with _warned("curves", "written"):
            self._log.close()

    def _drop_pictures_after(self, step: int) -> None:
        """They are of weights that were given up, and the steps may be sampled elsewhere now."""
        if not self._writes or not self._fence.holds():
            return
        with _warned(f"sample pictures after step {step}", "removed"):
            for file in sample_files(self._store):
                if file.step > step:
                    delete_if_there(self._store, file.path)


def _write(action: Callable[[], None], what: str, surely: bool) -> None:
    if surely:
        insist(action, store_errors(), what)
    else:
        with _warned(what, "written"):
            action()


@contextmanager
def _warned(what: str, done: str) -> Iterator[None]:
    try:
        yield
    except store_errors() as error:
        _logger.warning("%s not %s: %s", what, done, error)
