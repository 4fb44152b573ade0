"""Guard rails: what an iteration reports about itself, so that a collapse is seen early.

The DMD2 paper names the brightness of the samples as the signal to watch (§4.2); the rest is what
tells one cause from another: which loss dominates at the output, which times the fake score has
lost, how many numbers were not finite.
"""

from dataclasses import dataclass, field

import torch

from dmd_core.schedule import Schedule
from dmd_core.train_step import GeneratorStep

TIME_BINS = 4


class DivergedError(RuntimeError):
    """Training that has left the finite numbers for good."""


@dataclass
class Tally:
    """Sums and counts by name, so that workers and steps of any size add up to true means."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, total: float, count: float) -> None:
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (before[0] + total, before[1] + count)

    def add_mean(self, name: str, values: torch.Tensor) -> None:
        """`values` (B,): one per sample."""
        self.add(name, float(values.detach().sum()), float(len(values)))

    def add_bins(
        self, name: str, values: torch.Tensor, t: torch.Tensor, schedule: Schedule
    ) -> None:
        """`values` (B,) at times `t` (B,), apart for each quarter of the times: name0 … name3.

        A bin no sample fell into counts 0, so that every worker has the same names.
        """
        quarter = t * TIME_BINS // schedule.num_timesteps
        for index in range(TIME_BINS):
            inside = values.detach()[quarter == index]
            self.add(f"{name}{index}", float(inside.sum()), float(len(inside)))

    def merge(self, other: "Tally") -> None:
        for name, (total, count) in other.sums.items():
            self.add(name, total, count)

    def means(self) -> dict[str, float]:
        """Every mean, and the ratio of the two losses' gradients at the output."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        if means.get("grad_at_x_dm", 0.0) > 0 and "grad_at_x_reg" in means:
            means["grad_ratio_reg_dm"] = means["grad_at_x_reg"] / means["grad_at_x_dm"]
        return means


def sample_health(result: GeneratorStep, tally: Tally) -> None:
    """Mean and spread of the generated samples, each loss's gradient norm at the output, entries
    that were not finite; all per sample."""
    x = result.x
    tally.add("sample_mean", float(x.mean(dim=(1, 2, 3)).sum()), len(x))
    tally.add("sample_std", float(x.flatten(1).std(dim=1).sum()), len(x))
    for name, norms in result.output_norms.items():
        tally.add_mean(f"grad_at_x_{name}", norms)
    tally.add("nonfinite_entries", float(result.non_finite), len(x))
