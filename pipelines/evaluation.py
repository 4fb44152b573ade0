"""Station 9: student + held-out prompts → metrics.json.

Does the student beat what costs nothing (its own start, the mean picture) and what costs as little
(the teacher in one, two or four steps)? "Better" is said only beyond the confidence interval.
"""

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
import safetensors.numpy
import torch

from dmd_core.families import family_of, guidance_distilled, left_out, part_config
from dmd_core.features import FEATURE_SPACE, PIXELS
from dmd_core.files import write_atomic
from dmd_core.gallery import Gallery, load_gallery
from dmd_core.inception import INCEPTION_SPACE
from dmd_core.metrics import (
    Estimate,
    enough_for_frechet,
    frechet_distance,
    kid,
    kid_difference,
    mean_estimate,
    pair_distances,
    retrieval,
)
from dmd_core.noise import sample_noise
from dmd_core.plain_call import call_in_words
from dmd_core.prompt_encoding import class_label
from dmd_core.teacher import class_names, teacher_revision
from pipelines.alignment import alignment, clip_folder
from pipelines.config import EvaluateSection, PairsSection, StorageSection
from pipelines.images import SamplerPool, image_folders, make_images
from pipelines.inception_features import REAL, Judge
from pipelines.storage import Store
from pipelines.stored_images import Pictures, open_images
from pipelines.systems import (
    STUDENT,
    TEACHER,
    TEACHER_AGAIN,
    Images,
    Networks,
    SamplingPlan,
    network_evaluations,
)
from pipelines.timing import NOT_MEASURED, measure_speed
from pipelines.unit import Unit

# KID takes time in proportion to the square of the rows; its interval is narrow long before.
KID_ROWS = 5000
METRICS = "metrics.json"
FOLDER = "evaluation"
NOISE, NOISE_PROMPTS = f"{FOLDER}/latents.safetensors", f"{FOLDER}/latents.json"


class EvaluationError(ValueError):
    """An evaluation that cannot be measured with what it was given."""


def evaluate(
    section: EvaluateSection,
    pairs: PairsSection,
    *,
    run: Store,
    networks: Networks,
    prompts: Sequence[str],
    student_timesteps: tuple[int, ...] | None = None,
    revisions: dict[str, str] | None = None,
    provenance: dict[str, Any],
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Sample, measure, write `<run>/metrics.json`, return its content. Ray must be initialised.
    Raises what `check_evaluation` does, before it samples.

    `prompts` are the held-out ones; `networks.mean` None leaves the mean picture out; `revisions`
    (teacher_revision, student_revision) are taken here unless the caller has them;
    `provenance` (versions, manifest digest, checkpoint …) is recorded as it is.
    """
    plan, local = SamplingPlan.from_sections(section, pairs, student_timesteps), networks.local()
    check_evaluation(section, prompts, local.teacher, networks.storage)
    judge = Judge.of(section, networks.storage)
    unit = Unit.of_teacher(local.teacher, section.confidence)
    chosen = held_out(prompts, section.max_prompts) * section.samples_per_prompt
    revisions = revisions or {
        "teacher_revision": teacher_revision(local.teacher),
        "student_revision": teacher_revision(local.student),
    }
    systems = plan.systems(mean=networks.mean is not None, real=bool(section.real))
    folders = image_folders(plan, chosen, systems, mean=networks.mean, **revisions)
    root, pool = run.at(FOLDER), SamplerPool.of(section)
    make_images(
        root, folders, chosen, plan, networks,
        pool=pool, on_progress=on_progress,
    )  # fmt: skip
    images = {system: open_images(root, folder) for system, folder in folders.items()}
    features = {system: entry.features for system, entry in images.items()}
    if judge is not None:
        features = judge.features(root, folders, images, pool, on_progress)
    save_noise(run, plan, images[TEACHER].first(section.report_images))
    speed = ray.remote(measure_speed).options(num_cpus=pool.cpus, num_gpus=pool.gpus, **pool.where)
    own_space = PIXELS if family_of(local.teacher).on_pixels else FEATURE_SPACE
    space = own_space if judge is None else INCEPTION_SPACE
    metrics = _measure(images, features, load_gallery(local.teacher), unit, space)
    config = json.loads((Path(local.teacher) / "scheduler" / "scheduler_config.json").read_text())
    for system, entry in metrics["systems"].items():
        entry["network_evaluations"] = network_evaluations(
            plan, config, system, distilled=guidance_distilled(local.teacher)
        )
    metrics |= {
        "timing": ray.get(speed.remote(plan, networks, chosen, section.timing_repeats)),
        "alignment": alignment(section.clip_model, networks, root, folders, unit=unit, pool=pool),
        "pictures": {system: f"{FOLDER}/{folder}" for system, folder in folders.items()},
        "noise": NOISE,
        "again": _again(local.student, plan, images[STUDENT].first(1)),
        "provenance": asdict(plan) | revisions | provenance,
    }
    text = json.dumps(metrics, indent=2)
    write_atomic(run.fs, run.path(METRICS), text.encode())
    return json.loads(text)


def check_evaluation(
    section: EvaluateSection, prompts: Sequence[str], teacher: str, storage: StorageSection
) -> None:
    """Fail at the door, before hours of sampling. Raises `EvaluationError` where the held-out
    `prompts` are too few for the intervals of `teacher` (a local folder), and what `Judge.of` and
    `clip_folder` raise where something to measure with is not there."""
    chosen = held_out(prompts, section.max_prompts) * section.samples_per_prompt
    if why_not := Unit.of_teacher(teacher, section.confidence).too_few(chosen):
        raise EvaluationError(why_not)
    Judge.of(section, storage)
    if section.clip_model:
        clip_folder(section.clip_model, storage)


def held_out(prompts: Sequence[str], most: int | None) -> tuple[str, ...]:
    """The first `most` distinct prompts."""
    return tuple(dict.fromkeys(prompts))[:most]


def save_noise(run: Store, plan: SamplingPlan, images: Images) -> None:
    """ε of `images`, the first ones, as {"latents": (N,C,h,w) float32}, and their prompts beside.

    With them anyone reproduces the report's pictures with plain diffusers.
    """
    prompts = images.prompts
    seeds = plan.seeds(TEACHER, prompts)
    eps = sample_noise(seeds, images.latents.shape[1:], torch.float16).float().numpy()
    write_atomic(run.fs, run.path(NOISE), safetensors.numpy.save({"latents": eps}))
    listing = [{"prompt": p, "seed": s} for p, s in zip(prompts, seeds, strict=True)]
    text = json.dumps(listing, indent=1, ensure_ascii=False)
    write_atomic(run.fs, run.path(NOISE_PROMPTS), text.encode())


def _again(student: str, plan: SamplingPlan, images: Images) -> str:
    """Python that makes the first picture again from the first of the saved noise; "": none does,
    for pipelines of flow models re-noise from torch's own generator, a whole batch at a time."""
    family, prompt, label = family_of(student), images.prompts[0], None
    seed = images.seeds[0] if plan.student_steps > 1 else None
    if seed is not None and "flow" in family.schedules:
        return ""
    if family.on_pixels:
        classes = part_config(student, family.model).get("num_class_embeds")
        label = None if classes is None else class_label(prompt, class_names(student), classes)
    without = "".join(f", {name}=None" for name in left_out(student, family))
    height, width = images.pictures.shape[1:3]
    called = call_in_words(family, prompt, label, (height, width), plan.student_steps, seed)
    return f'pipe = DiffusionPipeline.from_pretrained("student"{without})\n{called}'


def _measure(
    images: Mapping[str, Pictures],
    features: Mapping[str, np.ndarray],
    gallery: Gallery | None,
    unit: Unit,
    space: str,
) -> dict[str, Any]:
    """Every number that is a function of the pictures alone. `space` names the features."""
    some = {system: values[:KID_ROWS] for system, values in features.items()}
    against, prompts = reference_of(features), images[TEACHER].prompts
    some_units = unit.of(prompts[:KID_ROWS])
    gallery, why_not = usable_gallery(gallery, prompts, features[TEACHER])
    return {
        "prompts": len(set(prompts)),
        "samples": len(prompts),
        "confidence": unit.confidence,
        "interval_over": unit.name,
        "feature_space": space,
        "feature_dimension": features[TEACHER].shape[1],
        "kid_samples": len(some[against]),
        "reference": against,
        "systems": {
            system: measure_system(system, images, features, gallery, unit) for system in images
        },
        "retrieval": why_not or f"gallery of {len(gallery.captions) if gallery else 0} pictures",
        "comparisons": {
            system: _compare(some[STUDENT], some[system], some[against], some_units)
            for system in images
            if system not in (STUDENT, TEACHER_AGAIN)
            and (system != TEACHER or against == REAL)  # else it would be its own yardstick
        },
    }


def measure_system(
    system: str,
    images: Mapping[str, Pictures],
    features: Mapping[str, np.ndarray],
    gallery: Gallery | None,
    unit: Unit,
) -> dict[str, Any]:
    """kid, fid, rmse and retrieval of one system; None for what says nothing about it, or for too
    few pictures (fid). `images` has it and `teacher`, `features` the reference too; `gallery` is a
    usable one, or None."""
    entry, ours, against = images[system], features[system], reference_of(features)
    found: dict[str, Any] = {"kid": None, "fid": None, "rmse": None, "retrieval": None}
    if system != against:
        theirs = features[against]
        some = unit.of(entry.prompts[:KID_ROWS])
        found["kid"] = asdict(kid(ours[:KID_ROWS], theirs[:KID_ROWS], **some))
        if against == REAL and enough_for_frechet(ours):
            found["fid"] = {"value": frechet_distance(ours, theirs), "samples": len(ours)}
    if system != TEACHER:
        found["rmse"] = asdict(_rmse(entry, images[TEACHER], unit))
    if gallery is not None:
        found["retrieval"] = _retrieval(entry.prompts, ours, gallery, unit)
    return found


def reference_of(features: Container[str]) -> str:
    """What every system is compared with: real pictures, or an independent draw of the teacher."""
    return REAL if REAL in features else TEACHER_AGAIN


def _compare(
    student: np.ndarray, baseline: np.ndarray, reference: np.ndarray, interval: dict[str, Any]
) -> dict[str, Any]:
    """Is the student nearer to the teacher than `baseline` is?"""
    difference = kid_difference(student, baseline, reference, **interval)
    return {"kid_difference": asdict(difference), "better": verdict(difference)}


def verdict(difference: Estimate) -> bool | str:
    """True, False, or "undecided" when the interval of student − baseline holds 0."""
    if difference.high < 0:
        return True
    return False if difference.low > 0 else "undecided"


def _rmse(images: Pictures, teacher: Pictures, unit: Unit) -> Estimate:
    """On the [0, 1] scale of a picture's pixels."""
    pairs = zip(_one_by_one(images), _one_by_one(teacher), strict=True)
    distances = [pair_distances(ours[None], theirs[None]) for ours, theirs in pairs]
    return mean_estimate(np.concatenate(distances), **unit.of(images.prompts))


def _one_by_one(images: Pictures) -> Iterator[np.ndarray]:
    for part in images.parts():
        yield from part.pictures.astype(np.float32) / 255


def usable_gallery(
    gallery: Gallery | None, prompts: Sequence[str], features: np.ndarray
) -> tuple[Gallery | None, str]:
    """The gallery if retrieval can be measured with it, else why not. `features`: the teacher's."""
    if gallery is None:
        return None, f"{NOT_MEASURED}: the teacher's folder has no gallery of real pictures"
    if gallery.features.shape[1] != features.shape[1]:
        return None, (
            f"{NOT_MEASURED}: the gallery's features have {gallery.features.shape[1]} dimensions, "
            f"these pictures' {features.shape[1]}"
        )
    if not set(gallery.captions) & set(prompts):
        return None, f"{NOT_MEASURED}: no prompt names a picture of the teacher's gallery"
    return gallery, ""


def _retrieval(
    prompts: Sequence[str], features: np.ndarray, gallery: Gallery, unit: Unit
) -> list[dict[str, Any]]:
    interval = unit.of(prompts)
    found = retrieval(features, prompts, gallery.features, gallery.captions, **interval)
    return [asdict(entry) for entry in found]
