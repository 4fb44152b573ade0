"""The noise schedule as a value: x_t = α_t x₀ + σ_t ε, and the conversions it allows.

Discrete variance-preserving schedules, as diffusers' Stable Diffusion schedulers carry them.
All coefficients are kept in float64: at t = 999 Stable Diffusion's α_t is 0.068, and x₀ from ε
divides by it.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class Schedule:
    """α_t and σ_t on the teacher's own grid of `num_timesteps` discrete times.

    `alphas` and `sigmas` are (T,) float64 with α² + σ² = 1; index 0 is the cleanest time.
    """

    alphas: torch.Tensor
    sigmas: torch.Tensor
    prediction_type: PredictionType

    @staticmethod
    def from_scheduler(scheduler) -> "Schedule":
        """Read the schedule of any diffusers scheduler that has `alphas_cumprod`."""
        prediction_type = scheduler.config.get("prediction_type", "epsilon")
        if prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"{type(scheduler).__name__} has prediction_type {prediction_type!r}; "
                f"expected one of {', '.join(get_args(PredictionType))}"
            )
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{type(scheduler).__name__} has no alphas_cumprod; "
                "expected a variance-preserving scheduler (Stable Diffusion 1.x or 2.x)"
            )
        alphas_cumprod = scheduler.alphas_cumprod.double().cpu()
        if prediction_type == "epsilon" and float(alphas_cumprod[-1]) < 1e-8:
            raise ValueError(
                "epsilon-prediction with a zero-terminal-SNR schedule: x0 = (x_t - σ ε)/α "
                "is undefined at α = 0; expected v_prediction or sample"
            )
        return Schedule(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), prediction_type)

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas)

    def coefficients(
        self, t: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(α_t, σ_t), each (B,1,…,1) to broadcast against `like` (B,…), float64."""
        view = (-1,) + (1,) * (like.ndim - 1)
        index = t.to(self.alphas.device)
        alpha_t, sigma_t = self.alphas[index].view(view), self.sigmas[index].view(view)
        return alpha_t.to(like.device), sigma_t.to(like.device)

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio α_t²/σ_t²: (B,) float64."""
        index = t.to(self.alphas.device)
        return (self.alphas[index] / self.sigmas[index]).square().to(t.device)

    def diffuse(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = α_t x₀ + σ_t ε, in the dtype of x₀."""
        alpha_t, sigma_t = self.coefficients(t, x0)
        return (alpha_t * x0 + sigma_t * eps).to(x0.dtype)

    def x0_from_output(
        self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """The network's output as x₀: (B,C,H,W) float32 (computed in float64)."""
        alpha_t, sigma_t = self.coefficients(t, x_t)
        if self.prediction_type == "epsilon":
            x0 = (x_t - sigma_t * output) / alpha_t
        elif self.prediction_type == "v_prediction":
            x0 = alpha_t * x_t - sigma_t * output
        else:
            x0 = output
        return x0.float()

    def output_from_x0(self, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Inverse of `x0_from_output`: what the network would have to say: float32."""
        alpha_t, sigma_t = self.coefficients(t, x_t)
        if self.prediction_type == "epsilon":
            output = (x_t - alpha_t * x0) / sigma_t
        elif self.prediction_type == "v_prediction":
            output = (alpha_t * x_t - x0) / sigma_t
        else:
            output = x0.double()
        return output.float()
