"""A teacher with closed-form answers in the plane: Gaussians on a ring, and how to judge samples.

Nothing here uses `dmd_core`'s algorithms. "Pictures" are points as (B,2,1,1) tensors. With
v_t = α_t² s² + σ_t² the posterior of mode k is r_k ∝ exp(−‖x_t − α_t μ_k‖² / 2v_t), and the exact
denoiser is x̂₀ = (α_t s²/v_t) x_t + (σ_t²/v_t) Σ_k r_k μ_k.
"""

import math
from dataclasses import dataclass

import torch

from dmd_core.condition import Condition
from dmd_core.schedule import Schedule

MODES = 8
STD = 0.1
NEAR = 3.0  # a sample belongs to a mode if within NEAR · STD of its centre: 98.9 % of exact ones
DIRECTIONS = 64  # of the sliced Wasserstein distance


def centres() -> torch.Tensor:
    """μ_k on the unit circle: (MODES,2) float64."""
    angle = torch.arange(MODES, dtype=torch.float64) * (2 * math.pi / MODES)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def exact_samples(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count,2) float32 draws from the mixture."""
    mode = torch.randint(MODES, (count,), generator=generator)
    return centres()[mode].float() + STD * torch.randn(count, 2, generator=generator)


def posterior_mean(
    x_t: torch.Tensor, alpha: torch.Tensor | float, sigma: torch.Tensor | float
) -> torch.Tensor:
    """E[x₀ | x_t] for x_t (B,2) float64; α, σ scalars or (B,1): (B,2) float64."""
    v = alpha**2 * STD**2 + sigma**2
    # All centres have norm 1, so of ‖x_t − α μ_k‖² only the inner product tells modes apart.
    r = torch.softmax(alpha * (x_t @ centres().T) / v, dim=1)
    return alpha * STD**2 / v * x_t + sigma**2 / v * (r @ centres())


@dataclass(frozen=True)
class MixtureDenoiser:
    """The exact denoiser on `schedule`, in float64 inside; ignores its conditioning."""

    schedule: Schedule

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        alpha, sigma = self.schedule.alphas[t, None], self.schedule.sigmas[t, None]
        x0 = posterior_mean(x_t.double().flatten(1), alpha, sigma)
        return x0.view_as(x_t).to(x_t.dtype)


def ode_endpoints(eps: torch.Tensor, schedule: Schedule, steps: int = 128) -> torch.Tensor:
    """The probability-flow ODE from x_T = init_noise_sigma · ε (B,2) to x₀ (B,2) float32.

    In y = x/α over s = σ/α it is dy/ds = (y − x̂₀)/s: Heun's steps on the Karras grid (ρ = 7) of s,
    and x̂₀ itself as the last step, from the smallest s to 0.
    """
    s_all = schedule.sigmas / schedule.alphas
    low, high = float(s_all[0]) ** (1 / 7), float(s_all[-1]) ** (1 / 7)
    grid = (torch.linspace(high, low, steps + 1, dtype=torch.float64)) ** 7
    y = eps.double() * schedule.init_noise_sigma / float(schedule.alphas[-1])
    for s, s_next in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        slope = (y - posterior_mean(y, 1.0, s)) / s
        guess = y + (s_next - s) * slope
        slope_next = (guess - posterior_mean(guess, 1.0, s_next)) / s_next
        y = y + (s_next - s) * (slope + slope_next) / 2
    return posterior_mean(y, 1.0, float(grid[-1])).float()


# ---------------------------------------------------------------------- how good are samples


@dataclass(frozen=True)
class Quality:
    """`shares`: fraction of all samples in each mode; `strays`: fraction in none. `spread`: their
    root mean square distance to their centres, relative to the exact one. `distance`: sliced
    Wasserstein-1 to exact samples."""

    shares: tuple[float, ...]
    strays: float
    spread: float
    distance: float

    @property
    def worst_share(self) -> float:
        return min(self.shares)


def judge_samples(samples: torch.Tensor, exact: torch.Tensor) -> Quality:
    """`samples`, `exact`: (N,2) each."""
    gap, mode = torch.cdist(samples.double(), centres()).min(dim=1)
    near = gap < NEAR * STD
    counts = torch.bincount(mode[near], minlength=MODES)
    rms = float(gap[near].square().mean().sqrt()) if near.any() else math.nan
    return Quality(
        shares=tuple((counts / len(samples)).tolist()),
        strays=1 - float(near.double().mean()),
        spread=rms / (math.sqrt(2) * STD),
        distance=sliced_wasserstein(samples, exact),
    )


def sliced_wasserstein(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over fixed directions of the Wasserstein-1 distance of the projections; x, y (N,2)."""
    angle = torch.arange(DIRECTIONS, dtype=torch.float64) * (math.pi / DIRECTIONS)
    directions = torch.stack([angle.cos(), angle.sin()])
    projected = [(points.double() @ directions).sort(dim=0).values for points in (x, y)]
    return float((projected[0] - projected[1]).abs().mean())
