"""After training a pixel teacher: samples beside real pictures, and its model card."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmd_core.noise import sample_noise, stable_seed
from dmd_core.teacher import Teacher, load_teacher
from pipelines import cifar10
from pipelines.config import StorageSection, TeacherTrainSection
from pipelines.plots import picture_grid
from pipelines.storage import open_store

_SOLVER, _STEPS = "edm_heun", 18
_COLUMNS = 8


def write_pixel_card(
    section: TeacherTrainSection, storage: StorageSection, *, seed: int, effort: str
) -> dict[str, Any]:
    """Write samples.png (per class: a row of real pictures, a row of samples) and README.md."""
    teacher = load_teacher(section.output)
    data = cifar10.load_split(open_store(section.pixel.path, storage), "train")
    rows: list[np.ndarray] = []
    for label, name in enumerate(cifar10.CLASSES):
        rows.append(data.pictures[data.labels == label][:_COLUMNS])
        rows.append(_sample(teacher, name, seed))
    folder = Path(section.output)
    (folder / "samples.png").write_bytes(picture_grid(rows))
    figures = {
        "parameters": sum(p.numel() for p in teacher.model.parameters()),
        "samples_seen": section.unet_steps * section.unet_batch_size,
    }
    (folder / "README.md").write_text(_card(section, figures, effort))
    return figures


@torch.no_grad()
def _sample(teacher: Teacher, name: str, seed: int) -> np.ndarray:
    seeds = [stable_seed("card", seed, name, column) for column in range(_COLUMNS)]
    eps = sample_noise(seeds, teacher.latent_shape())
    latents = teacher.solve(
        eps, [name] * _COLUMNS, solver=_SOLVER, steps=_STEPS, guidance_scale=1.0
    )
    return teacher.decode(latents)


def _card(section: TeacherTrainSection, figures: dict[str, Any], effort: str) -> str:
    pixel = section.pixel
    guidance = (
        f"Class dropout {pixel.class_dropout}: the prompt \"\" is 'no class', for guidance."
        if pixel.class_dropout
        else "No class dropout: guidance is not possible."
    )
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# CIFAR-10 teacher: a class-conditional pixel model

`ConsistencyModelPipeline` (a `UNet2DModel` with EDM's preconditioning), 32×32 pixels,
{figures["parameters"] / 1e6:.2f} M parameters, channels {list(pixel.channels)}. A prompt is a
class's name or its number; `classes.json` has the names. {guidance}

## Training, by `dmd train-teacher`

{section.unet_steps} steps of {section.unet_batch_size} pictures \
({figures["samples_seen"] / 1e6:.3g} M; the EDM paper's model saw 200 M). {effort}

Loss and noise as in EDM (Karras et al., 2022): ln σ ~ N({pixel.p_mean}, {pixel.p_std}²); Adam,
learning rate {section.unet_learning_rate:g}, dropout {pixel.dropout}; the weights are a moving
average. Of the paper's augmentation only mirroring.

## Data

CIFAR-10 (A. Krizhevsky, 2009), its 50,000 training pictures. The data set has no formal licence;
none of its pictures but those of the grid are in this folder. Top rows of `samples.png`: real
pictures; below each: samples of the same class, {_SOLVER}, {_STEPS} steps, no guidance.
"""
