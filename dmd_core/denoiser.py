"""The one interface the algorithm sees: denoise(x_t, t, cond) → x₀.

What a network predicts (ε, v, x₀, a flow's velocity, EDM's F), what it is told (text, class,
SDXL's sizes) and how guidance is applied is settled here, once; losses and training know nothing
of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from dmd_core.condition import Condition
from dmd_core.schedule import Schedule

# (network input, network time, cond) → raw network output, all (B,…)
RawNetwork = Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor]


class Denoiser(Protocol):
    """`schedule` gives α_t, σ_t; the call gives x₀ (B,C,H,W) float32 for x_t at times t (B,)."""

    @property
    def schedule(self) -> Schedule: ...

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor: ...


class DiffusersNetwork(nn.Module):
    """A diffusers UNet as a raw network: `Condition` → the arguments its class takes."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        return self.unet(x, time, **_unet_arguments(self.unet, cond), return_dict=False)[0]


def _unet_arguments(unet: nn.Module, cond: Condition) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if cond.labels is not None:
        arguments["class_labels"] = cond.labels
    if isinstance(unet, UNet2DModel):
        return arguments
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(
            f"{type(unet).__name__} is not a network this version drives; "
            "expected UNet2DConditionModel or UNet2DModel"
        )
    arguments["encoder_hidden_states"] = cond.text
    if cond.pooled is not None:  # SDXL
        arguments["added_cond_kwargs"] = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    return arguments


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
        with torch.autocast(
            x_t.device.type,
            dtype=torch.bfloat16,
            enabled=self.compute_dtype == torch.bfloat16,
        ):
            return self.network(
                self.schedule.network_input(x_t, t), self.schedule.network_time(t), cond
            )


@dataclass(frozen=True)
class GuidedDenoiser:
    """Classifier-free guidance at the standard scale s: x̂ = x̂_u + s (x̂_c − x̂_u).

    x₀ is affine in every prediction type, so guiding x₀ equals guiding the raw output. `uncond`
    has one row: the negative prompt, or the "no class" label. Both halves run in one forward pass.
    """

    denoiser: Denoiser
    scale: float
    uncond: Condition

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        if self.scale == 1.0:
            return self.denoiser(x_t, t, cond)
        both = self.denoiser(
            torch.cat([x_t, x_t]),
            torch.cat([t, t]),
            Condition.cat(self.uncond.expand(len(x_t)), cond),
        )
        x0_uncond, x0_cond = both.chunk(2)
        return x0_uncond + self.scale * (x0_cond - x0_uncond)
