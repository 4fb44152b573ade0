"""EDM's deterministic sampler (Karras et al. 2022, Algorithm 1) as a diffusers scheduler.

diffusers has Heun's method for its own noise schedules, and for EDM's preconditioning only Euler
and DPM-Solver++.
"""

from typing import Any

import torch
from diffusers import EDMEulerScheduler


class EDMHeunScheduler(EDMEulerScheduler):
    """`EDMEulerScheduler` with the trapezoidal correction of every step but the last.

    n steps are 2n − 1 network evaluations: in `timesteps` every time but the first comes twice,
    once at the end of a step (the correction), once at the start of the next.
    """

    order = 2

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: torch.Tensor | list[float] | None = None,
    ) -> None:
        """`num_inference_steps` σ on the Karras grid, from σ_max to σ_min, then 0."""
        super().set_timesteps(num_inference_steps, device, sigmas)  # type: ignore[arg-type]
        first, inner, last = self.sigmas[:1], self.sigmas[1:-1], self.sigmas[-1:]
        self.sigmas = torch.cat([first, inner.repeat_interleave(2), last])
        first, inner = self.timesteps[:1], self.timesteps[1:]
        self.timesteps = torch.cat([first, inner.repeat_interleave(2)])
        self._start: tuple[torch.Tensor, torch.Tensor] | None = None  # (x, dx/dσ) of this step

    def scale_model_input(
        self, sample: torch.Tensor, timestep: float | torch.Tensor
    ) -> torch.Tensor:
        if self.step_index is None:
            self._step_index = 0  # a time that comes twice has no index of its own
        return super().scale_model_input(sample, timestep)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **unused: Any,
    ) -> Any:
        """Half a step: to the next σ by Euler, or from there back and again with the mean slope."""
        index = self.step_index
        sigma, sample = self.sigmas[index], sample.to(torch.float32)
        x0 = self.precondition_outputs(sample, model_output, sigma)
        slope = (sample - x0) / sigma
        if self._start is None:
            next_sigma = self.sigmas[index + 1]
            moved = sample + (next_sigma - sigma) * slope
            self._start = (sample, slope) if next_sigma > 0 else None
        else:
            (start, first_slope), before = self._start, self.sigmas[index - 1]
            moved = start + (sigma - before) * (first_slope + slope) / 2
            self._start = None
        self._step_index += 1
        moved = moved.to(model_output.dtype)
        if not return_dict:
            return moved, x0
        from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput

        return EDMEulerSchedulerOutput(prev_sample=moved, pred_original_sample=x0)
