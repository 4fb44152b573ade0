"""Station 6: the losses of DMD and DMD2, as pure functions of tensors.

DMD: Yin et al., "One-step Diffusion with Distribution Matching Distillation", CVPR 2024
(arXiv 2311.18828). DMD2: Yin et al., NeurIPS 2024 (arXiv 2405.14867). Pictures or latents are
(B,C,H,W); every loss returns one value per sample, (B,), so that the caller weights samples, also
when workers hold unequal parts of a batch.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch.nn import functional as F

# (x, y) → distance per sample (B,)
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

DmWeighting = Literal["normalised", "sigma_over_alpha", "sigma3_over_alpha"]


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Mean over everything but the batch: (B,…) → (B,)."""
    return values.flatten(1).mean(dim=1)


_DISTANCES: dict[str, Distance] = {
    "l1": lambda x, y: _mean((x - y).abs()),
    "l2": lambda x, y: _mean((x - y).square()),
    "huber": lambda x, y: _mean(F.huber_loss(x, y, reduction="none", delta=0.5)),
}
REGRESSION_LOSSES = tuple(_DISTANCES)


@torch.no_grad()
def dmd_gradient(
    x: torch.Tensor,
    x0_real: torch.Tensor,
    x0_fake: torch.Tensor,
    *,
    weighting: DmWeighting = "normalised",
    alpha_t: torch.Tensor | None = None,
    sigma_t: torch.Tensor | None = None,
) -> torch.Tensor:
    """The distribution-matching gradient w_t α_t (s_fake − s_real) of DMD Eq. 7: (B,C,H,W).

    With both scores written as x₀-predictions, s = −(x_t − α_t x̂₀)/σ_t², the gradient is
    w_t (α_t/σ_t)² (x̂_fake − x̂_real). The paper's choice of w_t and the two it is compared with:

    - "normalised" (Eq. 8): w_t = (σ_t²/α_t) · CS/‖x̂_real − x‖₁, one number per sample. It leaves a
      factor α_t, which the paper's Algorithm 2 drops: g = (x̂_fake − x̂_real) / mean|x − x̂_real|.
    - "sigma_over_alpha": w_t = σ_t/α_t (DreamFusion's): g = (α_t/σ_t)(x̂_fake − x̂_real).
    - "sigma3_over_alpha": w_t = σ_t³/α_t (ProlificDreamer's): g = α_t σ_t (x̂_fake − x̂_real).

    `alpha_t`, `sigma_t` broadcast against x; only the last two need them.
    """
    difference = x0_fake - x0_real
    if weighting == "normalised":
        normaliser = (x - x0_real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        return difference / normaliser.clamp_min(1e-6)
    if alpha_t is None or sigma_t is None:
        raise ValueError(f"weighting {weighting!r} needs alpha_t and sigma_t")
    if weighting == "sigma_over_alpha":
        return (alpha_t / sigma_t * difference).to(x.dtype)
    if weighting == "sigma3_over_alpha":
        return (alpha_t * sigma_t * difference).to(x.dtype)
    raise ValueError(f"weighting {weighting!r}; expected one of {', '.join(get_args(DmWeighting))}")


def distribution_matching_loss(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """½‖x − sg(x − g)‖², mean per sample: (B,). Its derivative by x is g / (C·H·W) exactly."""
    return 0.5 * _mean((x - (x - gradient).detach()).square())


def fake_score_loss(x0_fake: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight(t) · ‖x̂_fake(x_t, t) − sg(x)‖², mean per sample: (B,) (DMD Eq. 6, Algorithm 3).

    With weight = SNR(t) = α_t²/σ_t² this is the mean squared error of ε, as for SD 1.5.
    """
    return weight.to(x0_fake) * _mean((x0_fake - x.detach()).square())


def regression_distance(kind: str) -> Distance:
    """A plain distance in the space of x and y, by name (DMD Eq. 9 uses LPIPS on decoded pixels:
    `dmd_core.perceptual`)."""
    if kind not in _DISTANCES:
        raise ValueError(f"regression loss {kind!r}; expected one of {', '.join(_DISTANCES)}")
    return _DISTANCES[kind]


def gan_generator_loss(logits: torch.Tensor) -> torch.Tensor:
    """−log D(x): softplus(−logits), non-saturating: (B,) (DMD2 Eq. 4, generator's side)."""
    return F.softplus(-logits)


def gan_discriminator_loss(logits_fake: torch.Tensor, logits_real: torch.Tensor) -> torch.Tensor:
    """−log(1 − D(fake)) − log D(real): (B,) (DMD2 Eq. 4, discriminator's side)."""
    return F.softplus(logits_fake) + F.softplus(-logits_real)


def r1_penalty(logits_real: torch.Tensor, logits_near: torch.Tensor, sigma: float) -> torch.Tensor:
    """((D(x + σ n) − D(x)) / σ)², n ~ N(0, I): (B,).

    Its mean over n tends to ‖∇D(x)‖², R1 (Mescheder et al. 2018), as σ → 0, by differences instead
    of a second derivative (Lin et al. 2025, arXiv 2501.08316), so any attention kernel will do.
    """
    return ((logits_near - logits_real) / sigma).square()
