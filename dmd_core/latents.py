"""Pictures ↔ what the networks see: a VAE's scaled latents, or the pixels themselves.

Also the shapes of both, from configurations alone, so that a recipe can be checked without
weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dmd_core.diffusers_networks import token_patch
from dmd_core.teacher_training import pictures_to_tensor

# Pixels that go through a VAE together: in float32 a usual one takes 3 GiB for a picture of
# 1024 × 1024, and for a batch of them all that a GPU has.
_AT_ONCE = 1024 * 1024


@dataclass(frozen=True)
class Geometry:
    """`channels` of a sample, of which one pixel is `factor` × `factor` of the picture; `own`
    (height, width) in pixels is what the teacher was trained at. `patch`: samples' pixels per side
    of a network's token."""

    channels: int
    factor: int
    own: tuple[int, int]
    patch: int = 1

    @property
    def step(self) -> int:
        """Of a picture's sides, in pixels: they are multiples of it."""
        return self.factor * self.patch

    def shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(C,h,w) of a height × width picture in pixels; None: the teacher's own. Raises
        ValueError."""
        for name, value in (("height", height), ("width", width)):
            if value is not None and value % self.step:
                raise ValueError(f"{name} is {value}; expected a multiple of {self.step}")
        own_height, own_width = self.own
        return (
            self.channels,
            (height or own_height) // self.factor,
            (width or own_width) // self.factor,
        )

    def pixels(self, shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
        """Height and width in pixels of samples (…,h,w)."""
        return shape[-2] * self.factor, shape[-1] * self.factor

    def image_tokens(self, shape: tuple[int, ...] | torch.Size) -> int:
        """Patches of samples (…,h,w): what a resolution-dependent noise schedule goes by."""
        return (shape[-2] // self.patch) * (shape[-1] // self.patch)


def geometry(
    class_name: str, model: Mapping[str, Any], vae: Mapping[str, Any] | None, size: int | None
) -> Geometry:
    """From the configuration of the network (of class `class_name`) and of the VAE (None: it works
    on pixels). `size`: the side of a sample where the network's configuration is not to say it."""
    factor = 1 if vae is None else 2 ** (len(vae["block_out_channels"]) - 1)
    side = size or model["sample_size"]
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    patch = token_patch(class_name, model)
    packed = 4 if class_name == "FluxTransformer2DModel" else 1
    own = height * factor, width * factor
    return Geometry(model["in_channels"] // packed, factor, own, patch)


# ------------------------------------------------------------------ values


def to_latents(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """The VAE's own z (B,C,h,w) as the denoising network sees it, about unit variance."""
    mean, std = _statistics(vae, z)
    return (z - mean) * (vae.config.scaling_factor / std)


def from_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_latents`, as the pipelines write it before they decode."""
    mean, std = _statistics(vae, latents)
    return latents * std / vae.config.scaling_factor + mean


def _statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """(shift, spread): SD 3's and FLUX's `shift_factor`, or a mean and deviation per channel."""
    mean, std = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
    if mean is None or std is None:
        return getattr(vae.config, "shift_factor", None) or 0.0, 1.0
    mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (mean, std))
    return mean, std


@torch.no_grad()
def encode_pictures(vae: Any, pictures: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Pictures (B,H,W,3) uint8 → samples (B,C,h,w) float32: the posterior's mean, scaled; without
    a VAE the pixels in [−1, 1]. A VAE gets about a megapixel at a time."""
    pixels = pictures_to_tensor(pictures)
    if vae is None:
        return pixels.to(device)
    pieces = pixels.split(_at_once(*pixels.shape[-2:]))
    means = [vae.encode(piece.to(device)).latent_dist.mean.float() for piece in pieces]
    return to_latents(vae, torch.cat(means))


@torch.no_grad()
def decode_samples(
    vae: Any, samples: torch.Tensor, device: torch.device | str | None = None
) -> np.ndarray:
    """Samples (B,C,h,w) → pictures (B,H,W,3) uint8. A VAE makes about a megapixel at a time."""
    samples = samples.float() if device is None else samples.float().to(device)
    if vae is None:
        return _to_pictures(samples)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = (side * factor for side in samples.shape[-2:])
    pieces = from_latents(vae, samples).split(_at_once(height, width))
    decoded = [_to_pictures(vae.decode(piece, return_dict=False)[0]) for piece in pieces]
    return np.concatenate(decoded)


def _at_once(height: int, width: int) -> int:
    """Pictures of a call."""
    return max(1, _AT_ONCE // (height * width))


def _to_pictures(pixels: torch.Tensor) -> np.ndarray:
    """(B,3,H,W) in [−1, 1] → (B,H,W,3) uint8."""
    pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
