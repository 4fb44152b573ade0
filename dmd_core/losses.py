"""Station 6: the losses of DMD, as pure functions of tensors.

Yin et al., "One-step Diffusion with Distribution Matching Distillation", CVPR 2024
(arXiv 2311.18828). Pictures or latents are (B,C,H,W); every function returns one value per sample,
(B,), so that the caller weights samples, also when workers hold unequal parts of a batch.
"""

import torch
from torch.nn import functional as F

REGRESSION_LOSSES = ("l1", "l2", "huber")


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Mean over everything but the batch: (B,…) → (B,)."""
    return values.flatten(1).mean(dim=1)


@torch.no_grad()
def dmd_gradient(x: torch.Tensor, x0_real: torch.Tensor, x0_fake: torch.Tensor) -> torch.Tensor:
    """The distribution-matching gradient g = (x̂_fake − x̂_real) / mean|x − x̂_real|, (B,C,H,W).

    Eq. 7 and 8 with both scores written as x₀-predictions: s = −(x_t − α_t x̂₀)/σ_t², so
    s_fake − s_real = α_t (x̂_fake − x̂_real)/σ_t², and w_t = (σ_t²/α_t)·CS/‖x̂_real − x‖₁ leaves a
    factor α_t, which the paper's Algorithm 2 drops. The normaliser is one number per sample.
    """
    normaliser = (x - x0_real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    return (x0_fake - x0_real) / normaliser.clamp_min(1e-6)


def distribution_matching_loss(x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """½‖x − sg(x − g)‖², mean per sample: (B,). Its derivative by x is g / (C·H·W) exactly."""
    return 0.5 * _mean((x - (x - gradient).detach()).square())


def fake_score_loss(
    x0_fake: torch.Tensor, x: torch.Tensor, snr_weight: torch.Tensor
) -> torch.Tensor:
    """Weight(t) · ‖x̂_fake(x_t, t) − sg(x)‖², mean per sample: (B,) (Algorithm 3).

    With weight = SNR(t) = α_t²/σ_t² this is the mean squared error of ε, as for SD 1.5.
    """
    return snr_weight.to(x0_fake) * _mean((x0_fake - x.detach()).square())


def regression_loss(x: torch.Tensor, y: torch.Tensor, kind: str) -> torch.Tensor:
    """Distance of the student's output to the teacher's for the same noise (Eq. 9): (B,).

    The paper uses LPIPS on decoded pixels; these are distances in the space of x and y.
    """
    if kind == "l1":
        return _mean((x - y).abs())
    if kind == "l2":
        return _mean((x - y).square())
    if kind == "huber":
        return _mean(F.huber_loss(x, y, reduction="none", delta=0.5))
    raise ValueError(f"regression loss {kind!r}; expected one of {', '.join(REGRESSION_LOSSES)}")
