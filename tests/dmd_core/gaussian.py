"""A teacher whose answers are known in closed form: data ~ N(m, s²), independently per pixel.

With k = α²s²/(α²s²+σ²) the exact denoiser is m + (k/α)(x_t − αm).
"""

from dataclasses import dataclass

import torch

from dmd_core.condition import Condition
from dmd_core.schedule import Schedule


@dataclass(frozen=True)
class GaussianDenoiser:
    """The exact denoiser of N(mean, std²) on `schedule`; ignores its conditioning."""

    schedule: Schedule
    mean: float
    std: float

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        alpha, sigma = self.schedule.coefficients(t, x_t)
        k = alpha**2 * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return (self.mean + k / alpha * (x_t - alpha * self.mean)).to(x_t.dtype)

    def network(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """The same as a raw network of the schedule's prediction type."""
        return self.schedule.output_from_x0(self(x_t, t, cond).double(), x_t.double(), t)
