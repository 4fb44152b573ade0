"""Station 9: student + held-out prompts → metrics.json.

Does the student beat what costs nothing (its own start, the mean picture) and what costs as little
(the teacher in one, two or four steps)?
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import safetensors.numpy
import torch

from dmd_core.families import family_of, guidance_distilled, left_out, part_config
from dmd_core.features import FEATURE_SPACE, PIXELS
from dmd_core.files import write_atomic
from dmd_core.gallery import load_gallery
from dmd_core.inception import INCEPTION_SPACE
from dmd_core.noise import sample_noise
from dmd_core.plain_call import call_in_words
from dmd_core.prompt_encoding import class_label
from dmd_core.teacher import class_names, teacher_revision
from pipelines.alignment import alignment, clip_folder
from pipelines.config import EvaluateSection, PairsSection, StorageSection
from pipelines.distances import distances_to_teacher
from pipelines.feature_parts import Progress, counted
from pipelines.images import SamplerPool, image_folders, make_images
from pipelines.inception_features import Judge
from pipelines.measures import measure, own_features
from pipelines.storage import Store
from pipelines.stored_images import open_images
from pipelines.systems import (
    STUDENT,
    TEACHER,
    Images,
    Networks,
    SamplingPlan,
    network_evaluations,
)
from pipelines.timing import measure_speed
from pipelines.unit import Unit

METRICS = "metrics.json"
FOLDER = "evaluation"
NOISE, NOISE_PROMPTS = f"{FOLDER}/latents.safetensors", f"{FOLDER}/latents.json"
# Settings of where the timing is measured. No picture follows from them.
TIMED_WHERE = ("cpus_per_actor", "gpus_per_actor", "placement")


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
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Sample, measure, write `<run>/metrics.json`, return its content. Ray must be initialised.
    Raises what `check_evaluation` does, before it samples.

    `prompts` are the held-out ones; `networks.mean` None leaves the mean picture out; `revisions`
    (teacher_revision, student_revision) are taken here unless the caller has them;
    `provenance` (versions, manifest digest, checkpoint …) is recorded as it is.
    `on_progress(done, total)` counts pictures: that are sampled, then that are measured.
    """
    plan, local = SamplingPlan.from_sections(section, pairs, student_timesteps), networks.local()
    check_evaluation(section, prompts, local.teacher, networks.storage)
    judge = Judge.of(section, networks.storage)
    unit = Unit.of_teacher(local.teacher, section.confidence)
    chosen = rows_of(section, prompts)
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
    save_noise(run, plan, images[TEACHER].first(section.report_images))
    # First what takes long and is kept as it is computed.
    if judge is None:
        features = own_features(images)
    else:
        features = judge.features(root, folders, images, pool, on_progress)
    aligned = alignment(
        section.clip_model, networks, root, folders,
        unit=unit, pool=pool, on_progress=on_progress,
    )  # fmt: skip
    total = sum(len(entry.prompts) for entry in images.values())
    distances = distances_to_teacher(images, counted(total, on_progress))
    own_space = PIXELS if family_of(local.teacher).on_pixels else FEATURE_SPACE
    space = own_space if judge is None else INCEPTION_SPACE
    metrics = measure(images, features, distances, load_gallery(local.teacher), unit, space)
    config = json.loads((Path(local.teacher) / "scheduler" / "scheduler_config.json").read_text())
    for system, entry in metrics["systems"].items():
        entry["network_evaluations"] = network_evaluations(
            plan, config, system, distilled=guidance_distilled(local.teacher)
        )
    metrics |= {
        "timing": _timing(section, plan, networks, chosen),
        "alignment": aligned,
        "pictures": {system: f"{FOLDER}/{folder}" for system, folder in folders.items()},
        "noise": NOISE,
        "again": _again(local.student, plan, images[STUDENT].first(1)),
        "provenance": asdict(plan) | revisions | provenance,
    }
    return _written(run, metrics)


def time_again(
    section: EvaluateSection,
    pairs: PairsSection,
    *,
    run: Store,
    networks: Networks,
    prompts: Sequence[str],
    student_timesteps: tuple[int, ...] | None = None,
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """`metrics`, those of `evaluate` with the same arguments but for where it is measured, with
    the timing measured anew: write `<run>/metrics.json`, return its content."""
    plan = SamplingPlan.from_sections(section, pairs, student_timesteps)
    timing = _timing(section, plan, networks, rows_of(section, prompts))
    return _written(run, {**metrics, "timing": timing})


def timing_inputs(section: EvaluateSection, threads: int | None) -> dict[str, Any]:
    """What decides the timing of given networks, beside the machine: kept with it."""
    where = section.model_dump(mode="json", include=set(TIMED_WHERE))
    return where | {"threads_per_actor": threads}


def check_evaluation(
    section: EvaluateSection, prompts: Sequence[str], teacher: str, storage: StorageSection
) -> None:
    """Fail at the door, before hours of sampling. Raises `EvaluationError` where the held-out
    `prompts` are too few for the intervals of `teacher` (a local folder), and what `check_judge`
    and `clip_folder` raise where something to measure with is not there."""
    chosen = rows_of(section, prompts)
    if why_not := Unit.of_teacher(teacher, section.confidence).too_few(chosen):
        raise EvaluationError(why_not)
    check_judge(section, chosen, storage)
    if section.clip_model:
        clip_folder(section.clip_model, storage)


def check_judge(section: EvaluateSection, chosen: Sequence[str], storage: StorageSection) -> None:
    """Fail at the door where Inception or real pictures are asked for. `chosen`: the prompt of
    each row. Raises what `Judge.of` and `Judge.check` do."""
    judge = Judge.of(section, storage)
    if judge is not None:
        judge.check(chosen)


def rows_of(section: EvaluateSection, prompts: Sequence[str]) -> tuple[str, ...]:
    """The prompt of each row of an evaluation."""
    return held_out(prompts, section.max_prompts) * section.samples_per_prompt


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


def _timing(
    section: EvaluateSection, plan: SamplingPlan, networks: Networks, chosen: tuple[str, ...]
) -> dict[str, Any]:
    pool = SamplerPool.of(section)
    # In a process of its own, and named here: with `options` Ray would use it again for other
    # work, with the device's memory as it was left.
    speed = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, max_calls=1, **pool.where)(
        measure_speed
    )
    found = ray.get(speed.remote(plan, networks, chosen, section.timing_repeats))
    return found | {"inputs": timing_inputs(section, networks.threads)}


def _written(run: Store, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """As it is read back."""
    text = json.dumps(metrics, indent=2)
    write_atomic(run.fs, run.path(METRICS), text.encode())
    return json.loads(text)
