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


Number = torch.Tensor | float


@dataclass
class Tally:
    """Sums and counts by name, so that workers and steps of any size add up to true means.

    Scalar tensors stay on their device until they are asked for: to read one is to wait for it.
    """

    sums: dict[str, tuple[Number, Number]] = field(default_factory=dict)

    def add(self, name: str, total: Number, count: Number) -> None:
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (before[0] + total, before[1] + count)

    def add_mean(self, name: str, values: torch.Tensor) -> None:
        """`values` (B,): one per sample."""
        self.add(name, _sum(values), float(len(values)))

    def add_bins(
        self, name: str, values: torch.Tensor, t: torch.Tensor, schedule: Schedule
    ) -> None:
        """`values` (B,) at times `t` (B,), apart for each quarter of the times: name0 … name3.

        A bin no sample fell into counts 0, so that every worker has the same names.
        """
        quarter = t * TIME_BINS // schedule.num_timesteps
        for index in range(TIME_BINS):
            inside = quarter == index
            self.add(f"{name}{index}", _sum(torch.where(inside, values, 0.0)), _sum(inside))

    def merge(self, other: "Tally") -> None:
        for name, (total, count) in other.sums.items():
            self.add(name, total, count)

    def stacked(self, device: torch.device) -> torch.Tensor:
        """(names, 2) float64: totals and counts, names in alphabetical order. Its sum over workers
        is what `means_of` takes."""
        rows = [self.sums[name] for name in sorted(self.sums)]
        numbers = [torch.as_tensor(n, dtype=torch.float64, device=device) for r in rows for n in r]
        return torch.stack(numbers).view(-1, 2) if numbers else torch.zeros(0, 2)

    def means(self) -> dict[str, float]:
        return self.means_of(self.stacked(self._device()))

    def means_of(self, stacked: torch.Tensor) -> dict[str, float]:
        """Every mean, and the ratio of the two losses' gradients at the output."""
        totals = zip(sorted(self.sums), stacked.tolist(), strict=True)
        means = {name: total / count for name, (total, count) in totals if count}
        if means.get("grad_at_x_dm", 0.0) > 0 and "grad_at_x_reg" in means:
            means["grad_ratio_reg_dm"] = means["grad_at_x_reg"] / means["grad_at_x_dm"]
        return means

    def _device(self) -> torch.device:
        """Where the tensors are."""
        numbers = (number for pair in self.sums.values() for number in pair)
        found = (number.device for number in numbers if isinstance(number, torch.Tensor))
        return next(found, torch.device("cpu"))


def sample_health(result: GeneratorStep, tally: Tally) -> None:
    """Mean, spread and mean square of the generated samples, each loss's gradient norm at the
    output, entries that were not finite; all per sample."""
    x = result.x
    tally.add_mean("sample_mean", x.mean(dim=(1, 2, 3)))
    tally.add_mean("sample_std", x.flatten(1).std(dim=1))
    tally.add_mean("sample_mean_square", x.square().mean(dim=(1, 2, 3)))
    for name, norms in result.output_norms.items():
        tally.add_mean(f"grad_at_x_{name}", norms)
    tally.add("nonfinite_entries", result.non_finite, float(len(x)))


def _sum(values: torch.Tensor) -> torch.Tensor:
    return values.detach().sum(dtype=torch.float64)
