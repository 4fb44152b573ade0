"""Station 9: the space in which pictures are compared.

For the miniature there is no public feature network that knows its pictures, so the teacher's own
frozen VAE gives the features. The space is named in every result, because distances in different
spaces cannot be compared.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL

from dmd_core.latents import encode_pictures

FEATURE_SPACE = "VAE latent mean"
PIXELS = "pixels"  # of a teacher without a VAE


@torch.no_grad()
def latent_features(
    vae: AutoencoderKL | None, pictures: np.ndarray, *, batch_size: int = 256
) -> np.ndarray:
    """Posterior mean × scaling factor, flattened: (N,H,W,3) uint8 → (N, C·h·w) float32; without a
    VAE the pixels in [−1, 1]."""
    device = "cpu" if vae is None else next(vae.parameters()).device
    starts = range(0, len(pictures), batch_size)
    parts = [
        encode_pictures(vae, pictures[start : start + batch_size], device).flatten(1).float().cpu()
        for start in starts
    ]
    return torch.cat(parts).numpy()
