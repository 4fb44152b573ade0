"""One evaluation beside a training: a checkpoint's student against its teacher, in one process.

It samples without Ray Data: a task that held its resources and waited for an actor with resources
of its own would wait for ever on a cluster that has nothing else free.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmd_core.gallery import load_gallery
from dmd_core.teacher import load_teacher
from pipelines import images
from pipelines.beside_results import Evaluated
from pipelines.beside_settings import EvaluationSection
from pipelines.computing import prepare_computing
from pipelines.config import EvaluateSection, PairsSection, StorageSection
from pipelines.distances import distances_to_teacher
from pipelines.evaluation import FOLDER, held_out
from pipelines.inception_features import Judge
from pipelines.measures import measure_system, own_features, usable_gallery
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import Store, open_store
from pipelines.stored_images import Pictures, open_images
from pipelines.student_export import export_checkpoint, load_student, weights_kind
from pipelines.systems import (
    STUDENT,
    TEACHER,
    TEACHER_AGAIN,
    Images,
    Networks,
    SamplingPlan,
    SystemSampler,
)
from pipelines.teacher_source import local_teacher
from pipelines.train_config import TrainSection
from pipelines.unit import Unit


@dataclass(frozen=True)
class EvaluationTask:
    """All that an evaluation is a function of, beside the step; plain JSON. `inputs`: digest of
    what decides the teacher's pictures. Results of one digest may be compared."""

    run: str
    teacher: str
    teacher_revision: str
    inputs: str
    prompts: tuple[str, ...]
    section: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    pairs: Mapping[str, Any]
    train: Mapping[str, Any]
    storage: Mapping[str, Any]

    @property
    def settings(self) -> EvaluationSection:
        return EvaluationSection.model_validate(self.section)

    def store(self) -> Store:
        return open_store(self.run, StorageSection.model_validate(self.storage))

    def plan(self) -> SamplingPlan:
        train = TrainSection.model_validate(self.train)
        return SamplingPlan.from_sections(
            EvaluateSection.model_validate(self.evaluate),
            PairsSection.model_validate(self.pairs),
            train.student_timesteps,
        )


def evaluation_task(
    section: EvaluationSection,
    train: TrainSection,
    *,
    evaluate: EvaluateSection,
    pairs: PairsSection,
    storage: StorageSection,
    run: str,
    teacher: str,
    teacher_revision: str,
    prompts: tuple[str, ...],
) -> EvaluationTask | None:
    """None: the recipe asks for no evaluation. `prompts`: the held-out ones; `run` and `teacher`
    are URLs."""
    if not section.steps:
        return None
    chosen = held_out(prompts, section.max_prompts) * evaluate.samples_per_prompt
    plan = SamplingPlan.from_sections(evaluate, pairs, train.student_timesteps)
    folders = images.image_folders(
        plan, chosen, [TEACHER], mean=None, teacher_revision=teacher_revision, student_revision=""
    )
    return EvaluationTask(
        run,
        teacher,
        teacher_revision,
        "-".join([folders[TEACHER].split("/")[0], *_yardstick(evaluate)]),
        chosen,
        *(part.model_dump(mode="json") for part in (section, evaluate, pairs, train, storage)),
    )


def _yardstick(evaluate: EvaluateSection) -> list[str]:
    """What else decides the figures of the same pictures."""
    return [
        name
        for name, given in (("inception", evaluate.features), ("real", evaluate.real))
        if given and given != "latents"
    ]


def measurable(
    section: EvaluationSection, evaluate: EvaluateSection, teacher: str, prompts: tuple[str, ...]
) -> str:
    """Why the chosen metric cannot be measured with this teacher (a local folder) and these
    held-out prompts; "": it can."""
    unit, chosen = (
        Unit.of_teacher(teacher, evaluate.confidence),
        held_out(prompts, section.max_prompts),
    )
    if why_not := unit.too_few(chosen * evaluate.samples_per_prompt):
        return why_not
    if section.metric != "retrieval":
        return ""
    if evaluate.features != "latents":
        return (
            "train.evaluation.metric is retrieval, which compares latents, but evaluate.features "
            f"is {evaluate.features}"
        )
    gallery = load_gallery(teacher)
    if gallery is None:
        return "train.evaluation.metric is retrieval, but the teacher's folder has no gallery"
    if not set(gallery.captions) & set(chosen):
        return "train.evaluation.metric is retrieval, but no prompt names a picture of the gallery"
    return ""


def evaluate_checkpoint(task: EvaluationTask, step: int) -> Evaluated:
    """Export the student of the checkpoint `step`, sample it, measure it."""
    section, run = task.settings, task.store()
    threads = max(1, int(section.num_cpus))
    prepare_computing(threads)
    storage = StorageSection.model_validate(task.storage)
    with tempfile.TemporaryDirectory(prefix="dmd-evaluate-") as folder:
        teacher = local_teacher(task.teacher, storage)
        student = str(Path(folder) / "student")
        weights = _export(task, run, step, teacher, student)
        networks = Networks(teacher, student, storage, gpus=section.num_gpus, threads=threads)
        found = teacher_pictures(task, run, networks)
        found[STUDENT] = _sample_student(task, networks)
        features = _features(task, run, found)
        gallery, _ = usable_gallery(load_gallery(teacher), task.prompts, features[STUDENT])
        unit = Unit.of_teacher(teacher, EvaluateSection.model_validate(task.evaluate).confidence)
    compared = {system: found[system] for system in (TEACHER, STUDENT)}
    distances = distances_to_teacher(compared)
    metrics = measure_system(STUDENT, found, features, distances, gallery, unit)
    provenance = {
        "inputs": task.inputs,
        "prompts": len(set(task.prompts)),
        "samples": len(task.prompts),
        "confidence": unit.confidence,
        "weights": weights,
        "teacher_revision": task.teacher_revision,
        "plan": asdict(task.plan()),
    }
    return Evaluated(step, metrics | {"retrieval": _share(metrics["retrieval"])}, provenance)


def teacher_pictures(task: EvaluationTask, run: Store, networks: Networks) -> dict[str, Pictures]:
    """The teacher's pictures and the reference draw, if it is one: made once, where `dmd evaluate`
    keeps its own, and shared with it where it takes the same prompts."""
    plan, root, folders = task.plan(), run.at(FOLDER), _teacher_folders(task)
    alone = images.SamplerPool(actors=0)
    images.make_images(root, folders, task.prompts, plan, networks, pool=alone)
    return {system: open_images(root, folder) for system, folder in folders.items()}


def _teacher_folders(task: EvaluationTask) -> dict[str, str]:
    evaluate = EvaluateSection.model_validate(task.evaluate)
    return images.image_folders(
        task.plan(), task.prompts, [TEACHER] if evaluate.real else [TEACHER, TEACHER_AGAIN],
        mean=None, teacher_revision=task.teacher_revision, student_revision="",
    )  # fmt: skip


def _features(
    task: EvaluationTask, run: Store, found: Mapping[str, Pictures]
) -> dict[str, np.ndarray]:
    """What the student is measured with: the teacher's own features, or Inception's."""
    evaluate = EvaluateSection.model_validate(task.evaluate)
    judge = Judge.of(evaluate, StorageSection.model_validate(task.storage))
    compared = {system: found[system] for system in (STUDENT, TEACHER_AGAIN) if system in found}
    if judge is None:
        return own_features(compared)
    alone = images.SamplerPool(actors=0, gpus=task.settings.num_gpus)
    return judge.features(run.at(FOLDER), _teacher_folders(task), compared, alone)


def _export(task: EvaluationTask, run: Store, step: int, teacher_dir: str, target: str) -> str:
    """Write the student's folder; returns which weights it has."""
    checkpoint = load_student(run, CHECKPOINTS, step)
    plan = task.plan()
    teacher = load_teacher(teacher_dir, size=(plan.height, plan.width))
    if teacher.revision != task.teacher_revision:
        raise ValueError(
            f"{task.teacher} has revision {teacher.revision[:12]}…, this run was started with "
            f"{task.teacher_revision[:12]}…"
        )
    train = TrainSection.model_validate(task.train)
    export_checkpoint(teacher, checkpoint, target, train, {"step": step})
    return weights_kind(checkpoint)


def _sample_student(task: EvaluationTask, networks: Networks) -> Images:
    """Not stored: pictures of a checkpoint that soon is gone."""
    plan = task.plan()
    sampler, seeds = SystemSampler(plan, networks), plan.seeds(STUDENT, task.prompts)
    batches = [slice(at, at + plan.batch_size) for at in range(0, len(seeds), plan.batch_size)]
    return Images.cat([sampler(STUDENT, task.prompts[rows], seeds[rows]) for rows in batches])


def _share(found: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    """The share at the smallest k, in the form of the other metrics."""
    if not found:
        return None
    first = min(found, key=lambda entry: entry["k"])
    rest = {key: first[key] for key in ("k", "chance", "counted")}
    return first["share"] | rest
