"""The one interface the algorithm sees: denoise(x_t, t, cond) → x₀.

What a network predicts (ε, v, x₀), how it takes its text and how guidance is applied is settled
here, once; losses and training know nothing of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from dmd_core.schedule import Schedule

# (x_t, t, cond) → raw network output, all (B,…)
RawNetwork = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Denoiser(Protocol):
    """`schedule` gives α_t, σ_t; the call gives x₀ (B,C,H,W) float32 for x_t at times t (B,)."""

    @property
    def schedule(self) -> Schedule: ...

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor: ...


def unet_network(unet) -> RawNetwork:
    """A diffusers `UNet2DConditionModel` (or a DDP wrapper of one) as a raw network."""

    def forward(x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return unet(x_t, t, encoder_hidden_states=cond, return_dict=False)[0]

    return forward


@dataclass(frozen=True)
class NetworkDenoiser:
    """A network with its schedule. `compute_dtype` bfloat16 runs the network under autocast."""

    network: RawNetwork
    schedule: Schedule
    compute_dtype: torch.dtype = torch.float32

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        with torch.autocast(
            x_t.device.type,
            dtype=torch.bfloat16,
            enabled=self.compute_dtype == torch.bfloat16,
        ):
            output = self.network(x_t, t, cond)
        return self.schedule.x0_from_output(output.float(), x_t, t)


@dataclass(frozen=True)
class GuidedDenoiser:
    """Classifier-free guidance at the standard scale s: x̂ = x̂_u + s (x̂_c − x̂_u).

    x₀ is affine in ε and in v, so guiding x₀ equals guiding the raw output. `uncond` (1,L,D) is
    the embedding of the negative prompt. Both halves run in one forward pass.
    """

    denoiser: Denoiser
    scale: float
    uncond: torch.Tensor

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        if self.scale == 1.0:
            return self.denoiser(x_t, t, cond)
        uncond = self.uncond.to(cond).expand(len(cond), *cond.shape[1:])
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([uncond, cond]))
        x0_uncond, x0_cond = both.chunk(2)
        return x0_uncond + self.scale * (x0_cond - x0_uncond)
