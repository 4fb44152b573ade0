"""What the user of each family's pipeline writes, by hand: the reference for pairs and students."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FluxPipeline

from dmd_core.teacher import Teacher, load_teacher
from tests.dmd_core.tiny_families import CLASSES, SIDE, save_family

PROMPTS = ["cat", "dog"]
PIXELS = ("edm", "ddpm", "unconditional")


class Families:
    """Folders and loaded teachers by name, made when first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.folder = cache(self._folder)
        self.teacher = cache(self._teacher)

    def _folder(self, name: str) -> str:
        return save_family(name, self._root / name.replace(" ", "_"))

    def _teacher(self, name: str) -> Teacher:
        size = (None, None) if name in PIXELS else (SIDE, SIDE)
        return load_teacher(self.folder(name), size=size)


def plain(folder: str) -> Any:
    absent: dict[str, Any] = {}
    if not (Path(folder) / "text_encoder_3").exists() and "StableDiffusion3" in _class(folder):
        absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unclipped_ddim(pipeline: Any) -> DDIMScheduler:
    """What our ODE of a pixel DDPM is compared with: its own DDPM scheduler draws noise at every
    step, and DDIM by default clips x₀ to [−1, 1] at every step, which is not the marginals' ODE."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    assert isinstance(scheduler, DDIMScheduler)
    return scheduler


def _class(folder: str) -> str:
    return json.loads((Path(folder) / "model_index.json").read_text())["_class_name"]


def call_by_hand(
    name: str, pipeline: Any, eps: torch.Tensor, steps: int, **arguments: Any
) -> torch.Tensor:
    """Samples (B,C,h,w) of the pipeline from ε; pixels are clamped to [−1, 1]."""
    if name == "unconditional":
        # It takes no latents: the generator that drew ε has to draw it again.
        generator = torch.Generator().manual_seed(0)
        images = pipeline(len(eps), generator, num_inference_steps=steps, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    if name in PIXELS:
        labels = [CLASSES.index(prompt) for prompt in PROMPTS]
        images = pipeline(
            len(eps), class_labels=labels, latents=eps, num_inference_steps=steps,
            output_type="pt", **arguments,
        ).images  # fmt: skip
        return images * 2 - 1
    packed = name.startswith("flux")
    if name == "pixart":
        arguments["use_resolution_binning"] = False
    latents = pipeline(
        PROMPTS, num_inference_steps=steps, height=SIDE, width=SIDE, output_type="latent",
        latents=FluxPipeline._pack_latents(eps, *eps.shape) if packed else eps, **arguments,
    ).images  # fmt: skip
    return FluxPipeline._unpack_latents(latents, SIDE, SIDE, 2) if packed else latents


def noise(teacher: Teacher) -> torch.Tensor:
    """ε for `PROMPTS`, as `randn_tensor` draws it from seed 0."""
    shape = len(PROMPTS), *teacher.latent_shape(*teacher.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
