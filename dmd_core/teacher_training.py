"""Training a miniature teacher from pictures and captions: the VAE, then the text-conditional UNet.

Losses are the ordinary ones of latent diffusion (Rombach et al., CVPR 2022): reconstruction with a
small KL term for the VAE; the mean squared error of the network's own prediction for the UNet,
with captions dropped at random so that classifier-free guidance works (Ho & Salimans, 2021).
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from dmd_core.schedule import Schedule

KL_WEIGHT = 1e-6  # as in latent diffusion's KL-regularised autoencoders


@dataclass(frozen=True)
class LatentSet:
    """The training set as the UNet sees it.

    `latents` (N, V, 4, h, w) float16: V views of each picture (as it is, and mirrored or again as
    it is), scaled to unit variance. `input_ids` (N, L) int64. `weights` (N,) float64, sum 1.
    """

    latents: torch.Tensor
    input_ids: torch.Tensor
    weights: np.ndarray


@dataclass(frozen=True)
class Batch:
    """x₀ (B,4,h,w), ε alike, t (B,) int64, input_ids (B,L)."""

    x0: torch.Tensor
    eps: torch.Tensor
    t: torch.Tensor
    input_ids: torch.Tensor


class TextConditionalUNet(nn.Module):
    """Text encoder and UNet as one module, so that one optimizer, EMA and DDP hold both."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        cond = self.text_encoder(input_ids)[0]
        return self.unet(x_t, t, encoder_hidden_states=cond, return_dict=False)[0]


def pictures_to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """(N,H,W,3) uint8 → (N,3,H,W) float32 in [−1, 1]."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def vae_loss(
    vae: AutoencoderKL, pictures: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Mean absolute + squared reconstruction error and `KL_WEIGHT` × KL to N(0, I): a scalar."""
    posterior = vae.encode(pictures).latent_dist
    mean, std = posterior.mean.float(), posterior.std.float()
    z = mean + std * torch.randn(mean.shape, generator=generator)
    error = vae.decode(z, return_dict=False)[0].float() - pictures
    kl = 0.5 * (mean.square() + std.square() - 1.0 - 2.0 * std.log()).sum(dim=(1, 2, 3)).mean()
    return error.abs().mean() + error.square().mean() + KL_WEIGHT * kl


def sample_batch(
    data: LatentSet,
    schedule: Schedule,
    rng: np.random.Generator,
    *,
    batch_size: int,
    caption_dropout: float,
    empty_ids: torch.Tensor,
    timestep_power: float = 1.0,
) -> Batch:
    """A weighted random batch with its noise and stratified timesteps, drawn from `rng` alone.

    t = T u^p with u uniform. p < 1 spends fewer samples on almost clean pictures, where the noise
    cannot be told from the picture, and more where the caption has to say what is to be seen.
    """
    rows = rng.choice(len(data.weights), size=batch_size, p=data.weights)
    views = rng.integers(data.latents.shape[1], size=batch_size)
    x0 = data.latents[torch.from_numpy(rows), torch.from_numpy(views)].float()
    eps = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32))
    strata = (rng.permutation(batch_size) + rng.random(batch_size)) / batch_size
    t = torch.from_numpy(strata**timestep_power * schedule.num_timesteps).long()
    dropped = torch.from_numpy(rng.random(batch_size) < caption_dropout)
    input_ids = data.input_ids[torch.from_numpy(rows)].clone()
    input_ids[dropped] = empty_ids
    return Batch(x0, eps, t, input_ids)


def denoiser_loss(model: nn.Module, batch: Batch, schedule: Schedule) -> torch.Tensor:
    """Mean squared error of the network's own prediction (ε or v): a scalar."""
    x_t = schedule.diffuse(batch.x0, batch.eps, batch.t)
    target = schedule.output_from_x0(batch.x0, x_t, batch.t)
    return (model(x_t, batch.t, batch.input_ids).float() - target).square().mean()


def warmup_and_decay(step: int, *, total: int, warmup: int, decay_share: float = 0.3) -> float:
    """Learning-rate factor: linear warm-up, flat, then linear to zero over the last share."""
    decay = max(1, round(total * decay_share))
    return min(1.0, (step + 1) / max(1, warmup), max(0.0, (total - step) / decay))


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL, pictures: torch.Tensor, batch_size: int = 256
) -> torch.Tensor:
    """Posterior means, unscaled: (N,3,H,W) → (N,4,h,w) float32."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(batch_size)])
