"""The student G: the teacher's network, called once, or a few times on a fixed list of times."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dmd_core.condition import Condition
from dmd_core.denoiser import Denoiser


@dataclass(frozen=True)
class Student:
    """G(x_t, τ_k, cond) = x̂₀ on the times τ_0 > τ_1 > … (`timesteps`).

    One time, T − 1: the one-step student of DMD (§4.1). One earlier time, such as 399: the network
    is told τ_0 though its input is pure noise (DMD2's one-step SDXL). Several, such as 999, 749,
    499, 249: DMD2's few-step student (§4.4), which predicts x₀ and re-noises it to the next time.
    """

    denoiser: Denoiser
    timesteps: tuple[int, ...]

    def __post_init__(self) -> None:
        total = self.denoiser.schedule.num_timesteps
        falling = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        if (
            not self.timesteps
            or not falling
            or not 0 <= min(self.timesteps) <= max(self.timesteps) < total
        ):
            raise ValueError(
                f"student timesteps {list(self.timesteps)}; expected falling times in [0, {total})"
            )

    @staticmethod
    def one_step(denoiser: Denoiser) -> "Student":
        """G(ε) = x̂₀(x_T, T − 1)."""
        return Student(denoiser, (denoiser.schedule.num_timesteps - 1,))

    def start(self, eps: torch.Tensor) -> torch.Tensor:
        """x_T from ε, as the teacher's ODE starts."""
        return eps * self.denoiser.schedule.init_noise_sigma

    def times(self, step: int, like: torch.Tensor) -> torch.Tensor:
        """τ_step for every sample: (B,) int64."""
        return torch.full((len(like),), self.timesteps[step], device=like.device)

    def predict(self, x_t: torch.Tensor, step: int, cond: Condition) -> torch.Tensor:
        """x̂₀ of step `step` from its input x_t: (B,C,h,w) float32."""
        return self.denoiser(x_t, self.times(step, x_t), cond)

    def __call__(self, eps: torch.Tensor, cond: Condition) -> torch.Tensor:
        """ε (B,C,h,w) → x̂₀ of the first step: the whole sample of a one-step student."""
        return self.predict(self.start(eps), 0, cond)

    @torch.no_grad()
    def rollout(self, noises: Sequence[torch.Tensor], cond: Condition, step: int) -> torch.Tensor:
        """The input of step `step`, from the student's own earlier steps (backward simulation).

        `noises`: ε of the start and of each re-noising, at least `step` + 1 of them (B,C,h,w).
        """
        x_t = self.start(noises[0])
        for k in range(step):
            x0 = self.predict(x_t, k, cond)
            t, earlier = self.times(k, x0), self.times(k + 1, x0)
            x_t = self.denoiser.schedule.renoise(x0, x_t, noises[k + 1], t, earlier)
        return x_t

    @torch.no_grad()
    def sample(self, noises: Sequence[torch.Tensor], cond: Condition) -> torch.Tensor:
        """x₀ after all steps; `noises` has one entry per step."""
        last = len(self.timesteps) - 1
        return self.predict(self.rollout(noises, cond, last), last, cond)
