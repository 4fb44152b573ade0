"""What a line of a training's log is about: the steps since the line before."""

import time
from dataclasses import dataclass

import torch

from dmd_core.health import Tally
from pipelines.workers import Group


@dataclass(frozen=True)
class Measured:
    """`means`: of everything counted on all workers. `step_s`: seconds of a step, by rank 0's
    clock. `elapsed_s`: since the line before, by this worker's."""

    means: dict[str, float]
    step_s: float
    elapsed_s: float


class LogWindow:
    """Every worker has one. `steps`: in it so far. `nonfinite_before`: updates that the run had
    left out when it began."""

    def __init__(self, nonfinite_before: int) -> None:
        self.steps, self._nonfinite_before = 0, nonfinite_before
        self._tally, self._started = Tally(), time.monotonic()

    def add(self, tally: Tally) -> None:
        self._tally.merge(tally)
        self.steps += 1

    def nonfinite_updates(self, so_far: int) -> int:
        """Left out in this window, `so_far` in the whole run. Rules judge lines: what a week adds
        up to says nothing about now."""
        return so_far - self._nonfinite_before

    def measured(self, group: Group, device: torch.device) -> Measured:
        """At the same step on all workers. `device`: where they add up."""
        stacked = self._tally.stacked(device)
        if group.size > 1:
            torch.distributed.all_reduce(stacked)
        elapsed = time.monotonic() - self._started
        step_s = group.share(elapsed / self.steps)
        return Measured(self._tally.means_of(stacked), step_s, elapsed)
