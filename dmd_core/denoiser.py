"""The one interface the algorithm sees: denoise(x_t, t, cond) → x₀.

What a network predicts (ε, v, x₀, a flow's velocity, EDM's F), what it is told (text, class,
SDXL's sizes) and how guidance is applied is settled here, once; losses and training know nothing
of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from dmd_core.condition import Condition
from dmd_core.precision import autocast
from dmd_core.schedule import Schedule

# (network input, network time, cond) → raw network output, all (B,…)
RawNetwork = Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor]


class Denoiser(Protocol):
    """`schedule` gives α_t, σ_t; the call gives x₀ (B,C,H,W) float32 for x_t at times t (B,)."""

    @property
    def schedule(self) -> Schedule: ...

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor: ...


@dataclass(frozen=True)
class NetworkDenoiser:
    """A network with its schedule. `compute_dtype` bfloat16 runs the network under autocast; the
    conversion to x₀ is done in float64 always."""

    network: RawNetwork
    schedule: Schedule
    compute_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.compute_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"compute_dtype {self.compute_dtype}; expected float32 or bfloat16")

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        output = self.raw(x_t, t, cond)
        return self.schedule.x0_from_output(output.float(), x_t, t)

    def raw(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """The network's own output at index t, in the dtype it is computed in."""
        with autocast(x_t.device, self.compute_dtype):
            return self.network(
                self.schedule.network_input(x_t, t), self.schedule.network_time(t), cond
            )


@dataclass(frozen=True)
class GuidedDenoiser:
    """Classifier-free guidance at the standard scale s: x̂ = x̂_u + s (x̂_c − x̂_u).

    x₀ is affine in every prediction type, so guiding x₀ equals guiding the raw output. `uncond`
    has one row: the negative prompt, or the "no class" label. Both halves run in one forward pass.
    A guidance-distilled network is told s instead.
    """

    denoiser: Denoiser
    scale: float
    uncond: Condition

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        if cond.guidance is not None:
            return self.denoiser(x_t, t, cond.with_guidance(self.scale))
        if self.scale == 1.0:
            return self.denoiser(x_t, t, cond)
        both = self.denoiser(
            torch.cat([x_t, x_t]),
            torch.cat([t, t]),
            Condition.cat(self.uncond.expand(len(x_t)), cond),
        )
        x0_uncond, x0_cond = both.chunk(2)
        return x0_uncond + self.scale * (x0_cond - x0_uncond)
