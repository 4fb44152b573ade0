"""The student G: the teacher's network, called once with its time fixed at the last step."""

from dataclasses import dataclass

import torch

from dmd_core.denoiser import Denoiser


@dataclass(frozen=True)
class OneStepStudent:
    """G(ε, cond) = x̂₀(ε, T−1, cond), one network evaluation (§4.1 of the DMD paper).

    At t = T−1 the teacher's ODE starts from x_T = ε, so ε goes in unscaled, as the pipelines do.
    """

    denoiser: Denoiser

    @property
    def conditioning_timestep(self) -> int:
        return self.denoiser.schedule.num_timesteps - 1

    def __call__(self, eps: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """ε (B,C,h,w), cond (B,L,D) → x (B,C,h,w), float32."""
        t = torch.full((len(eps),), self.conditioning_timestep, device=eps.device)
        return self.denoiser(eps, t, cond)
