"""Training a class-conditional pixel teacher as EDM does (Karras et al., NeurIPS 2022, Table 1).

σ is log-normal; the network F sees c_in x and ln σ / 4, and x̂₀ = c_skip x + c_out F. With the
weight λ(σ) = (σ² + σ_data²) / (σ σ_data)² the loss is the squared error of F itself. Left out of
the paper's recipe: its augmentation other than flips, which needs an input that diffusers'
UNet2DModel does not have.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import torch
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler, UNet2DModel
from torch import nn

from dmd_core.teacher_training import pictures_to_tensor

SIGMA_DATA = 0.5


@dataclass(frozen=True)
class PixelSize:
    """The network's shape. `attention_levels`: indices into `channels`; level 0 has full size.

    `classes` names; with `no_class` there is one more embedding, "no class", for guidance.
    """

    image_size: int
    channels: tuple[int, ...]
    layers_per_block: int
    attention_levels: tuple[int, ...]
    dropout: float
    classes: int
    no_class: bool


@dataclass(frozen=True)
class EdmBatch:
    """x₀ and ε (B,3,H,W), σ (B,) float32, labels (B,) int64."""

    x0: torch.Tensor
    eps: torch.Tensor
    sigma: torch.Tensor
    labels: torch.Tensor


def build_unet(size: PixelSize) -> UNet2DModel:
    """EDM's DDPM++ as near as diffusers has it: positional noise embedding, one attention head."""
    levels = range(len(size.channels))
    down = tuple(f"{_attention(size, level)}DownBlock2D" for level in levels)
    up = tuple(f"{_attention(size, level)}UpBlock2D" for level in reversed(levels))
    return UNet2DModel(
        sample_size=size.image_size,
        in_channels=3,
        out_channels=3,
        freq_shift=1,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=size.channels,
        layers_per_block=size.layers_per_block,
        attention_head_dim=None,
        norm_num_groups=max(1, min(32, gcd(*size.channels) // 4)),  # as EDM: 4 channels or more
        dropout=size.dropout,
        num_class_embeds=size.classes + size.no_class,
    )


def build_pipeline(unet: UNet2DModel) -> ConsistencyModelPipeline:
    """What loads and samples with plain diffusers: the pixel teacher's folder."""
    scheduler: Any = EDMEulerScheduler(  # its type hint knows its own scheduler alone
        sigma_min=0.002, sigma_max=80.0, sigma_data=SIGMA_DATA, rho=7.0, num_train_timesteps=1000
    )
    return ConsistencyModelPipeline(unet=unet, scheduler=scheduler)


def sample_batch(
    pictures: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    *,
    batch_size: int,
    class_dropout: float,
    no_class: int,
    p_mean: float,
    p_std: float,
) -> EdmBatch:
    """A random batch of `pictures` (N,H,W,3) uint8, half of them mirrored, drawn from `rng` alone.

    ln σ ~ N(`p_mean`, `p_std`²), stratified over the batch; a share of the labels is `no_class`.
    """
    rows = rng.integers(len(pictures), size=batch_size)
    chosen = pictures[rows].copy()
    mirrored = rng.random(batch_size) < 0.5
    chosen[mirrored] = chosen[mirrored][:, :, ::-1]
    x0 = pictures_to_tensor(chosen)
    eps = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
    strata = (rng.permutation(batch_size) + rng.random(batch_size)) / batch_size
    normal = torch.special.ndtri(torch.from_numpy(strata).clamp(1e-6, 1 - 1e-6))
    dropped = rng.random(batch_size) < class_dropout
    given = np.where(dropped, no_class, labels[rows]).astype(np.int64)
    return EdmBatch(x0, eps, (p_mean + p_std * normal).exp().float(), torch.from_numpy(given))


def edm_loss(unet: nn.Module, batch: EdmBatch) -> torch.Tensor:
    """Mean of λ(σ) (x̂₀ − x₀)², which is the mean squared error of F: a scalar."""
    sigma = batch.sigma.view(-1, 1, 1, 1)
    total = sigma.square() + SIGMA_DATA**2
    x = batch.x0 + sigma * batch.eps
    output = unet(
        x / total.sqrt(), batch.sigma.log() / 4, class_labels=batch.labels, return_dict=False
    )[0]
    c_skip, c_out = SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total.sqrt()
    return (output.float() - (batch.x0 - c_skip * x) / c_out).square().mean()


def ema_halflife(samples_seen: int, halflife_samples: float, rampup: float = 0.05) -> float:
    """The half-life grows with what was seen, so that the random start is soon forgotten."""
    return max(1.0, min(halflife_samples, samples_seen * rampup))


def _attention(size: PixelSize, level: int) -> str:
    return "Attn" if level in size.attention_levels else ""
