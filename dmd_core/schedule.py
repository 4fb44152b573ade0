"""The noise schedule as a value: x_t = α_t x₀ + σ_t ε, and the conversions it allows.

Every family is a grid of T discrete times; index 0 is the cleanest, T − 1 is (nearly) pure noise:

- variance-preserving (DDPM, Stable Diffusion 1.x/2.x, SDXL): α² + σ² = 1, any β schedule;
- EDM / variance-exploding (Karras et al. 2022): α = 1, σ on the Karras grid, 1000 bins as in DMD;
- flow matching (SD 3, FLUX): α = 1 − σ, σ shifted towards noise for large pictures.

All coefficients are kept in float64: at t = 999 Stable Diffusion's α_t is 0.068, and x₀ from ε
divides by it.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch

from dmd_core import diffusers_schedules as reading

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction", "edm", "edm_v"]
# How the fake score's error is weighted over t; each is the mean squared error of …
ScoreWeight = Literal["teacher", "epsilon", "v", "x0", "edm"]


class _Tables(NamedTuple):
    """What a schedule looks up, on one device."""

    alphas: torch.Tensor
    sigmas: torch.Tensor
    network_times: torch.Tensor | None


@dataclass(frozen=True)
class Schedule:
    """α_t and σ_t on the teacher's own grid of `num_timesteps` discrete times.

    `alphas`, `sigmas` (T,) float64. `network_times` (T,): what the network is told at index t
    (None: the index). The ODE starts from x_T = `init_noise_sigma` · ε. `sigma_data` is EDM's.
    """

    alphas: torch.Tensor
    sigmas: torch.Tensor
    prediction_type: PredictionType
    network_times: torch.Tensor | None = None
    init_noise_sigma: float = 1.0
    sigma_data: float = 0.5
    _tables: dict[torch.device, _Tables] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    # ------------------------------------------------------------------ families

    @staticmethod
    def from_scheduler(scheduler, *, image_tokens: int | None = None) -> "Schedule":
        """The schedule of a diffusers scheduler of any supported family.

        `image_tokens` (latent patches of one picture) sets the shift of schedulers with dynamic,
        resolution-dependent shifting.
        """
        kind = reading.prediction_type(scheduler)
        family = reading.family(type(scheduler).__name__, scheduler.config)
        if family == "flow":
            shift = reading.flow_shift(scheduler.config, image_tokens)
            return Schedule.flow(scheduler.config.num_train_timesteps, shift)
        if family == "edm":
            return Schedule._edm(
                reading.edm_sigmas(scheduler),
                scheduler.config.sigma_data,
                "edm_v" if kind == "v_prediction" else "edm",
                init_noise_sigma=float(scheduler.init_noise_sigma),
            )
        return Schedule.vp(reading.alphas_cumprod(scheduler), kind)  # type: ignore[arg-type]

    @staticmethod
    def vp(alphas_cumprod: torch.Tensor, prediction_type: PredictionType) -> "Schedule":
        """Variance-preserving, from ᾱ_t (T,), decreasing."""
        alphas_cumprod = alphas_cumprod.double().cpu()
        if prediction_type == "epsilon" and float(alphas_cumprod[-1]) == 0.0:
            raise ValueError(reading.ZERO_SNR_EPSILON)
        return Schedule(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), prediction_type)

    @staticmethod
    def edm(
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        num_timesteps: int = 1000,
        sigma_data: float = 0.5,
    ) -> "Schedule":
        """σ on the Karras grid (EDM Eq. 5), network with EDM's preconditioning; x_T = σ_max ε."""
        ramp = torch.linspace(0, 1, num_timesteps, dtype=torch.float64)
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        sigmas = (low + ramp * (high - low)) ** rho
        return Schedule._edm(sigmas, sigma_data, "edm", init_noise_sigma=sigma_max)

    @staticmethod
    def _edm(
        sigmas: torch.Tensor, sigma_data: float, kind: PredictionType, *, init_noise_sigma: float
    ) -> "Schedule":
        c_noise = (sigmas.log() / 4).float()  # EDM Table 1
        alphas = torch.ones_like(sigmas)
        return Schedule(alphas, sigmas, kind, c_noise, init_noise_sigma, sigma_data)

    @staticmethod
    def flow(num_timesteps: int = 1000, shift: float = 1.0) -> "Schedule":
        """Flow matching, v = ε − x₀. σ' = s σ / (1 + (s − 1) σ) (SD 3, Eq. 23)."""
        plain = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
        sigmas = shift * plain / (1 + (shift - 1) * plain)
        return Schedule(1 - sigmas, sigmas, "flow_prediction", (sigmas * num_timesteps).float())

    # ------------------------------------------------------------------ α, σ, log-SNR

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas)

    def _on(self, device: torch.device) -> _Tables:
        """Where the times are: there, looking one up waits for no copy from or to the device."""
        if device not in self._tables:
            own = self.network_times
            times = None if own is None else own.to(device)
            self._tables[device] = _Tables(self.alphas.to(device), self.sigmas.to(device), times)
        return self._tables[device]

    def coefficients(
        self, t: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(α_t, σ_t), each (B,1,…,1) to broadcast against `like` (B,…), float64."""
        view, tables = (-1,) + (1,) * (like.ndim - 1), self._on(t.device)
        alpha_t, sigma_t = tables.alphas[t].view(view), tables.sigmas[t].view(view)
        return alpha_t.to(like.device), sigma_t.to(like.device)

    def snr(self, t: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio α_t²/σ_t²: (B,) float64."""
        tables = self._on(t.device)
        return (tables.alphas[t] / tables.sigmas[t]).square()

    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        """λ_t = 2 log(α_t/σ_t): (B,) float64; −∞ where α_t = 0."""
        return self.snr(t).log()

    def time_of_log_snr(self, log_snr: torch.Tensor) -> torch.Tensor:
        """Inverse of `log_snr`: (B,) float64 times in [0, T−1], linear in λ between grid points."""
        grid = -self.log_snr(torch.arange(self.num_timesteps))  # increasing
        return _interpolated_index(grid, -log_snr.double().cpu()).to(log_snr.device)

    def time_of_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """The time with σ_t = `sigma`: (B,) float64, linear in σ between grid points."""
        return _interpolated_index(self.sigmas.cpu(), sigma.double().cpu()).to(sigma.device)

    def time_of_alpha(self, alpha: torch.Tensor) -> torch.Tensor:
        """The time with α_t = `alpha`: (B,) float64. EDM's α is 1 everywhere: no inverse."""
        if float(self.alphas[0]) == float(self.alphas[-1]):
            raise ValueError("α is constant on a variance-exploding schedule; it has no inverse")
        return _interpolated_index(-self.alphas.cpu(), -alpha.double().cpu()).to(alpha.device)

    def score_weight(self, t: torch.Tensor, kind: ScoreWeight = "teacher") -> torch.Tensor:
        """Weight of ‖x̂₀ − x₀‖² at t: (B,) float64.

        "epsilon": SNR, the mean squared error of ε (DMD for SD 1.5). "edm": SNR + 1/σ_data² (DMD
        for EDM). "v": 1/σ², the error of v and of the flow's velocity. "x0": 1. "teacher": the
        one of these with which a teacher of this prediction type was itself trained.
        """
        if kind == "teacher":
            kind = _TEACHER_WEIGHT[self.prediction_type]
        if kind == "epsilon":
            return self.snr(t)
        if kind == "edm":
            return self.snr(t) + self.sigma_data**-2
        if kind == "v":
            return self._on(t.device).sigmas[t].square().reciprocal()
        if kind == "x0":
            return torch.ones(len(t), dtype=torch.float64, device=t.device)
        raise ValueError(
            f"score weight {kind!r}; expected one of {', '.join(get_args(ScoreWeight))}"
        )

    def diffuse(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = α_t x₀ + σ_t ε, in the dtype of x₀."""
        alpha_t, sigma_t = self.coefficients(t, x0)
        return (alpha_t * x0 + sigma_t * eps).to(x0.dtype)

    def renoise(
        self, x0: torch.Tensor, x_t: torch.Tensor, eps: torch.Tensor, t: torch.Tensor,
        earlier: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """From x_t and the x̂₀ a few-step student saw in it to the input of its next step, x_s at
        the `earlier` time s: x_s = α_s x̂₀ + σ_s ε (DMD2 §4.4).

        EDM's scheduler keeps a little of x_t instead, with r = σ_s/σ_t the first-order step of
        SDE-DPM-Solver++ (Lu et al. 2022): x_s = r² x_t + (1 − r²) x̂₀ + σ_s √(1 − r²) ε. The noise
        in x_s has the same σ_s. At 999, 749, 499, 249 of EDM's own grid r² is 0.05, 0.02, 0.005.
        """
        if not self._is_edm:
            return self.diffuse(x0, eps, earlier)
        _, sigma_t = self.coefficients(t, x0)
        _, sigma_s = self.coefficients(earlier, x0)
        kept = (sigma_s / sigma_t) ** 2
        return (kept * x_t + (1 - kept) * x0 + sigma_s * (1 - kept).sqrt() * eps).to(x0.dtype)

    # ------------------------------------------------------------------ what the network sees

    @property
    def _is_edm(self) -> bool:
        return self.prediction_type in ("edm", "edm_v")

    def network_time(self, t: torch.Tensor) -> torch.Tensor:
        """What the network is told at index t: the index, c_noise, or 1000 σ. (B,)."""
        times = self._on(t.device).network_times
        return t if times is None else times[t]

    def network_input(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t as the network takes it: c_in · x_t for EDM (1/√(σ² + σ_data²)), else x_t."""
        if not self._is_edm:
            return x_t
        _, sigma_t = self.coefficients(t, x_t)
        return (x_t / (sigma_t**2 + self.sigma_data**2).sqrt()).to(x_t.dtype)

    def x0_from_output(
        self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """The network's output as x₀: (B,C,H,W) float32 (computed in float64)."""
        alpha_t, sigma_t = self.coefficients(t, x_t)
        if self.prediction_type == "epsilon":
            x0 = (x_t - sigma_t * output) / alpha_t
        elif self.prediction_type == "v_prediction":
            x0 = alpha_t * x_t - sigma_t * output
        elif self.prediction_type == "flow_prediction":
            x0 = x_t - sigma_t * output
        elif self.prediction_type == "sample":
            x0 = output
        else:
            c_skip, c_out = self._edm_scalings(sigma_t)
            x0 = c_skip * x_t + c_out * output
        return x0.float()

    def output_from_x0(self, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Inverse of `x0_from_output`: what the network would have to say: float32."""
        alpha_t, sigma_t = self.coefficients(t, x_t)
        if self.prediction_type == "epsilon":
            output = (x_t - alpha_t * x0) / sigma_t
        elif self.prediction_type == "v_prediction":
            output = (alpha_t * x_t - x0) / sigma_t
        elif self.prediction_type == "flow_prediction":
            output = (x_t - x0) / sigma_t
        elif self.prediction_type == "sample":
            output = x0.double()
        else:
            c_skip, c_out = self._edm_scalings(sigma_t)
            output = (x0 - c_skip * x_t) / c_out
        return output.float()

    def _edm_scalings(self, sigma_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(c_skip, c_out) of EDM Table 1; diffusers' v-variant has the other sign of c_out."""
        total = sigma_t**2 + self.sigma_data**2
        sign = -1.0 if self.prediction_type == "edm_v" else 1.0
        return self.sigma_data**2 / total, sign * sigma_t * self.sigma_data / total.sqrt()


_TEACHER_WEIGHT: dict[str, ScoreWeight] = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "flow_prediction": "v",
    "sample": "x0",
    "edm": "edm",
    "edm_v": "edm",
}


def _interpolated_index(grid: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Where `value` lies on the increasing `grid` (T,): float64 in [0, T−1]."""
    upper = torch.searchsorted(grid, value).clamp(1, len(grid) - 1)
    low, high = grid[upper - 1], grid[upper]
    share = ((value - low) / (high - low)).clamp(0.0, 1.0)
    share = torch.where(value >= high, torch.ones_like(share), share)  # also where high is ∞
    return (upper - 1).double() + share
