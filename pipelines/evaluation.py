"""Station 9: student + held-out prompts → metrics.json.

Does the student beat what costs nothing (its own start, the mean picture) and what costs as little
(the teacher in one, two or four steps)? "Better" is said only beyond the confidence interval.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
import safetensors.numpy
import torch

from dmd_core.features import FEATURE_SPACE
from dmd_core.files import write_atomic
from dmd_core.gallery import Gallery, load_gallery
from dmd_core.metrics import Estimate, kid, kid_difference, regression_distance, retrieval
from dmd_core.noise import sample_noise
from dmd_core.teacher import teacher_revision
from pipelines.beside_settings import FEWEST_PROMPTS
from pipelines.config import EvaluateSection, PairsSection
from pipelines.images import image_files, make_images, read_images
from pipelines.storage import Store
from pipelines.systems import (
    MEAN,
    START,
    STUDENT,
    TEACHER,
    TEACHER_AGAIN,
    Images,
    Networks,
    SamplingPlan,
    network_evaluations,
)
from pipelines.timing import NOT_MEASURED, measure_speed

METRICS = "metrics.json"
FOLDER = "evaluation"
NOISE, NOISE_PROMPTS = f"{FOLDER}/latents.safetensors", f"{FOLDER}/latents.json"


def evaluate(
    section: EvaluateSection,
    pairs: PairsSection,
    *,
    run: Store,
    networks: Networks,
    prompts: Sequence[str],
    student_timesteps: tuple[int, ...] | None = None,
    provenance: dict[str, Any],
    actors: int = 1,
    gpus_per_actor: float = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Sample, measure, write `<run>/metrics.json`, return its content. Ray must be initialised.

    `prompts` are the held-out ones; `networks.mean` None leaves the mean picture out;
    `provenance` (versions, manifest digest, checkpoint …) is recorded as it is.
    """
    chosen = held_out(prompts, section.max_prompts)
    plan, local = SamplingPlan.from_sections(section, pairs, student_timesteps), networks.local()
    revisions = {
        "teacher_revision": teacher_revision(local.teacher),
        "student_revision": teacher_revision(local.student),
    }
    files = image_files(plan, chosen, _systems(plan, networks), mean=networks.mean, **revisions)
    folder = run.at(FOLDER)
    make_images(
        folder, files, chosen, plan, networks,
        actors=actors, gpus_per_actor=gpus_per_actor, on_progress=on_progress,
    )  # fmt: skip
    images = {system: read_images(folder, path) for system, path in files.items()}
    save_noise(run, plan, images[TEACHER], section.report_images)
    speed = ray.remote(measure_speed).options(num_cpus=1, num_gpus=gpus_per_actor)
    metrics = _measure(images, load_gallery(local.teacher), section.confidence)
    config = json.loads((Path(local.teacher) / "scheduler" / "scheduler_config.json").read_text())
    for system, entry in metrics["systems"].items():
        entry["network_evaluations"] = network_evaluations(plan, config, system)
    metrics |= {
        "timing": ray.get(speed.remote(plan, networks, chosen, section.timing_repeats)),
        "pictures": {system: f"{FOLDER}/{path}" for system, path in files.items()},
        "noise": NOISE,
        "provenance": asdict(plan) | revisions | provenance,
    }
    text = json.dumps(metrics, indent=2)
    write_atomic(run.fs, run.path(METRICS), text.encode())
    return json.loads(text)


def held_out(prompts: Sequence[str], most: int | None) -> tuple[str, ...]:
    """The first `most` distinct prompts. Raises ValueError for too few."""
    chosen = tuple(dict.fromkeys(prompts))[:most]
    if len(chosen) < FEWEST_PROMPTS:
        raise ValueError(
            f"evaluate.prompts gives {len(chosen)} distinct prompts; expected at least "
            f"{FEWEST_PROMPTS}, for prompts are what the confidence intervals are over"
        )
    return chosen


def save_noise(run: Store, plan: SamplingPlan, images: Images, count: int) -> None:
    """ε of the first `count` prompts as {"latents": (N,C,h,w) float32}, and their prompts beside.

    With them anyone reproduces the report's pictures with plain diffusers.
    """
    prompts = images.prompts[:count]
    seeds = plan.seeds(TEACHER, prompts)
    eps = sample_noise(seeds, images.latents.shape[1:], torch.float16).float().numpy()
    write_atomic(run.fs, run.path(NOISE), safetensors.numpy.save({"latents": eps}))
    listing = [{"prompt": p, "seed": s} for p, s in zip(prompts, seeds, strict=True)]
    text = json.dumps(listing, indent=1, ensure_ascii=False)
    write_atomic(run.fs, run.path(NOISE_PROMPTS), text.encode())


def _systems(plan: SamplingPlan, networks: Networks) -> list[str]:
    free = [START] if networks.mean is None else [START, MEAN]
    return [TEACHER, STUDENT, TEACHER_AGAIN, *free, *plan.few()]


def _measure(
    images: dict[str, Images], gallery: Gallery | None, confidence: float
) -> dict[str, Any]:
    """Every number that is a function of the pictures alone."""
    features = {system: entry.features for system, entry in images.items()}
    teacher, reference = images[TEACHER], features[TEACHER_AGAIN]
    gallery, why_not = usable_gallery(gallery, teacher)
    systems = {system: measure_system(system, images, gallery, confidence) for system in images}
    return {
        "prompts": len(teacher.prompts),
        "confidence": confidence,
        "feature_space": FEATURE_SPACE,
        "feature_dimension": reference.shape[1],
        "reference": TEACHER_AGAIN,
        "systems": systems,
        "retrieval": why_not or f"gallery of {len(gallery.captions) if gallery else 0} pictures",
        "comparisons": {
            system: _compare(features[STUDENT], features[system], reference, confidence)
            for system in images
            if system not in (TEACHER, TEACHER_AGAIN, STUDENT)
        },
    }


def measure_system(
    system: str, images: dict[str, Images], gallery: Gallery | None, confidence: float
) -> dict[str, Any]:
    """kid, rmse and retrieval of one system; None for what says nothing about it. `images` has it,
    `teacher` and `teacher_again`; `gallery` is a usable one, or None."""
    entry, reference = images[system], images[TEACHER_AGAIN].features
    found: dict[str, Any] = {"kid": None, "rmse": None, "retrieval": None}
    if system != TEACHER_AGAIN:
        found["kid"] = asdict(kid(entry.features, reference, confidence=confidence))
    if system != TEACHER:
        found["rmse"] = asdict(_rmse(entry, images[TEACHER], confidence))
    if gallery is not None:
        found["retrieval"] = _retrieval(entry, gallery, confidence)
    return found


def _compare(
    student: np.ndarray, baseline: np.ndarray, reference: np.ndarray, confidence: float
) -> dict[str, Any]:
    """Is the student nearer to the teacher than `baseline` is?"""
    difference = kid_difference(student, baseline, reference, confidence=confidence)
    return {"kid_difference": asdict(difference), "better": verdict(difference)}


def verdict(difference: Estimate) -> bool | str:
    """True, False, or "undecided" when the interval of student − baseline holds 0."""
    if difference.high < 0:
        return True
    return False if difference.low > 0 else "undecided"


def _rmse(images: Images, teacher: Images, confidence: float) -> Estimate:
    """On the [0, 1] scale of a picture's pixels."""
    ours, theirs = (entry.pictures.astype(np.float32) / 255 for entry in (images, teacher))
    return regression_distance(ours, theirs, confidence=confidence)


def usable_gallery(gallery: Gallery | None, teacher: Images) -> tuple[Gallery | None, str]:
    """The gallery if retrieval can be measured with it, else why not."""
    if gallery is None:
        return None, f"{NOT_MEASURED}: the teacher's folder has no gallery of real pictures"
    if gallery.features.shape[1] != teacher.features.shape[1]:
        return None, (
            f"{NOT_MEASURED}: the gallery's features have {gallery.features.shape[1]} dimensions, "
            f"these pictures' {teacher.features.shape[1]}"
        )
    if not set(gallery.captions) & set(teacher.prompts):
        return None, f"{NOT_MEASURED}: no prompt names a picture of the teacher's gallery"
    return gallery, ""


def _retrieval(images: Images, gallery: Gallery, confidence: float) -> list[dict[str, Any]]:
    found = retrieval(
        images.features, images.prompts, gallery.features, gallery.captions, confidence=confidence
    )
    return [asdict(entry) for entry in found]
