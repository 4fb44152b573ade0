"""Station 9: the space in which pictures are compared.

For the miniature there is no public feature network that knows its pictures, so the teacher's own
frozen VAE gives the features. The space is named in every result, because distances in different
spaces cannot be compared.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL

from dmd_core.teacher_training import pictures_to_tensor

FEATURE_SPACE = "VAE latent mean"


@torch.no_grad()
def latent_features(
    vae: AutoencoderKL, pictures: np.ndarray, *, batch_size: int = 256
) -> np.ndarray:
    """Posterior mean × scaling factor, flattened: (N,H,W,3) uint8 → (N, C·h·w) float32."""
    device = next(vae.parameters()).device
    parts = []
    for part in pictures_to_tensor(pictures).split(batch_size):
        mean = vae.encode(part.to(device)).latent_dist.mean
        parts.append((mean * vae.config.scaling_factor).flatten(1).float().cpu())
    return torch.cat(parts).numpy()
