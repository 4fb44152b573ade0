"""Latents → pixels with gradient, so that the regression loss can compare what people see.

DMD decodes both latents and takes LPIPS (§4.4 of the paper), through a tiny decoder where the full
one does not fit.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from dmd_core.families import family_of, folder_geometry
from dmd_core.latents import from_latents
from dmd_core.losses import Distance
from dmd_core.teacher import Teacher, TeacherError

# latents (B,C,h,w) → pixels (B,3,H,W) in about [−1, 1]
Decode = Callable[[torch.Tensor], torch.Tensor]
_CLASSES: dict[str, Any] = {"AutoencoderTiny": AutoencoderTiny, "AutoencoderKL": AutoencoderKL}
_CHANNELS = 4  # of latents, where a configuration does not say


def load_decoder(teacher: Teacher, source: str) -> Decode:
    """The teacher's own VAE ("vae"), or an AutoencoderTiny / AutoencoderKL folder, frozen. Of a
    teacher on pixels: the pixels themselves."""
    vae: Any = teacher.vae
    if vae is None:
        return lambda pixels: pixels
    if source != "vae":
        vae = _load(source)
        vae.to(device=teacher.device)
        vae.eval().requires_grad_(False)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        return vae.decode(from_latents(vae, latents), return_dict=False)[0]

    return decode


def decoded(distance: Distance, decode: Decode) -> Distance:
    """`distance` between what x and y decode to; no graph is kept for y."""

    def measure(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = decode(y)
        return distance(decode(x), target)

    return measure


def check_decoder(source: str, teacher: str | Path) -> None:
    """Fail at the door: is this "vae", or a folder that `load_decoder` takes, of latents like those
    of the folder `teacher`?"""
    if source == "vae":
        return
    _decoder_class(source)
    own = _config(source).get("latent_channels", _CHANNELS)
    expected = folder_geometry(teacher).channels
    if own != expected and not family_of(teacher).on_pixels:  # of those nothing is decoded
        raise TeacherError(
            f"decoder {source} decodes latents of {own} channels; expected {expected}, as those of "
            f"teacher {teacher} have"
        )


def _load(source: str) -> Any:
    return _decoder_class(source).from_pretrained(
        source, use_safetensors=True, local_files_only=True
    )


def _decoder_class(source: str) -> Any:
    name = _config(source).get("_class_name")
    if name not in _CLASSES:
        raise TeacherError(f"decoder {source} is a {name}; expected {' or '.join(_CLASSES)}")
    return _CLASSES[name]


def _config(source: str) -> dict[str, Any]:
    file = Path(source) / "config.json"
    if not file.is_file():
        raise TeacherError(
            f"decoder {source} has no config.json; expected vae (the teacher's own, which needs no "
            f"file), or a local folder with one of {', '.join(_CLASSES)}"
        )
    return json.loads(file.read_text())
