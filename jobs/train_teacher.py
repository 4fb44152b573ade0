"""`dmd train-teacher`: the miniature Stable Diffusion from captioned emoji, or a pixel teacher on
CIFAR-10, with Ray Train."""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmd_core.checkpoint import committed_steps
from jobs.config import Recipe, resolve_shipped
from jobs.errors import Exit, JobError
from jobs.placement import check_room, teacher_training_demand
from jobs.run_settings import TEACHER_MAY_CHANGE, changed_settings, flat_settings
from jobs.session import Session
from pipelines.config import TeacherTrainSection
from pipelines.costs import Work, estimate, teacher_step_rate
from pipelines.storage import open_store

CHECKPOINTS = "teacher_checkpoints"
SETTINGS = "teacher_settings.json"  # those that the checkpoints were trained with
CARD = "README.md"


def run(session: Session) -> dict[str, Any]:
    """Train the networks, write the pipeline folder with its model card (and gallery)."""
    section = _section(session)
    _check_data(session, section)
    _check_settings(session)
    session.open_run()
    total, trained = section.total_steps, _trained_steps(session)
    if trained >= total and (Path(section.output) / CARD).exists():
        session.display.done(f"train-teacher: nothing to do, {section.output} is complete")
        return {"teacher": section.output, "trained": False}
    if not trained:
        session.write_json(SETTINGS, _settings(session.recipe))
    from pipelines.workers import run_worker_group

    started = time.monotonic()
    session.start_ray()
    check_room(session, teacher_training_demand(session.recipe))
    with session.watch("train-teacher", total, "steps") as board:
        run_worker_group(
            _loop(section),
            {
                "section": section.model_dump(),
                "seed": session.recipe.run.seed,
                "dir": session.store.url,
                "storage": session.recipe.storage.model_dump(),
                "board": board,
            },
            store=session.store,
            num_workers=section.num_workers,
            cpus_per_worker=1,
            use_gpu=section.use_gpu,
            max_failures=section.max_failures,
            stored=lambda: _trained_steps(session),
            placement=section.placement,
        )
    effort = (
        f"Trained on {section.num_workers} worker(s) of a machine with {os.cpu_count()} cores "
        f"({platform.processor() or platform.machine()}); the last start took "
        f"{time.monotonic() - started:.0f} s."
    )
    figures = _write_card(session, section, effort)
    session.display.done(f"train-teacher: {section.output}")
    return {"teacher": section.output, "trained": True, **figures}


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; touches nothing."""
    section = _section(session)
    _check_data(session, section)
    _check_settings(session)
    vae_steps = section.total_steps - section.unet_steps
    workers, cost = section.num_workers, session.recipe.cost
    work = Work(section.total_steps, 1, workers, float(workers * section.use_gpu))
    return {
        "data": section.data if section.data == "emoji" else section.pixel.path,
        "vae_steps": vae_steps,
        "unet_steps": section.unet_steps,
        "pictures_seen": vae_steps * section.vae_batch_size
        + section.unet_steps * section.unet_batch_size,
        "writes_to": section.output,
        **estimate(work, teacher_step_rate(cost), cost),
    }


def _loop(section: TeacherTrainSection) -> Callable[[dict[str, Any]], None]:
    if section.data == "cifar10":
        from pipelines.pixel_teacher import train_pixel_teacher_loop

        return train_pixel_teacher_loop
    from pipelines.teacher_training import train_teacher_loop

    return train_teacher_loop


def _write_card(session: Session, section: TeacherTrainSection, effort: str) -> dict[str, Any]:
    seed = session.recipe.run.seed
    if section.data == "cifar10":
        from pipelines.pixel_card import write_pixel_card

        session.display.say("train-teacher: sampling every class")
        return write_pixel_card(section, session.recipe.storage, seed=seed, effort=effort)
    from pipelines.teacher_card import write_card

    session.display.say("train-teacher: measuring seen and held-out captions")
    return write_card(section, seed=seed, effort=effort)


def _check_data(session: Session, section: TeacherTrainSection) -> None:
    """Fail at the door: is the data set there, whole?"""
    if section.data == "cifar10":
        from pipelines.cifar10 import dataset_digest

        dataset_digest(open_store(section.pixel.path, session.recipe.storage))


def _trained_steps(session: Session) -> int:
    """So many steps are in the newest checkpoint; 0: there is none."""
    steps = committed_steps(session.store.fs, session.store.path(CHECKPOINTS))
    return steps[-1] if steps else 0


def _settings(recipe: Recipe) -> dict[str, Any]:
    section = recipe.train_teacher.model_dump(mode="json")
    return {"run": {"seed": recipe.run.seed}, "train_teacher": section}


def _check_settings(session: Session) -> None:
    """Refuse to go on with a teacher, or to take it for finished, under settings that it was not
    trained with. One without a record was begun by a release that kept none: it goes on."""
    trained, kept = _trained_steps(session), session.read_json(SETTINGS)
    if not trained or kept is None:
        return
    # Defaults: of keys that a later release added.
    then = flat_settings(_settings(Recipe())) | flat_settings(kept)
    changed = changed_settings(then, flat_settings(_settings(session.recipe)), TEACHER_MAY_CHANGE)
    if changed:
        raise JobError(
            f"{session.store.url} holds a teacher of other settings ({'; '.join(changed)}). Give "
            "its own recipe (--config), use another folder (--set run.dir=…), or remove "
            f"{session.store.url}/{CHECKPOINTS} to start afresh.",
            Exit.REFUSED,
        )
    total = session.recipe.train_teacher.total_steps
    if trained > total:
        raise JobError(
            f"{session.store.url} holds a teacher of {trained} steps; expected train_teacher."
            f"unet_steps that make at least as many, these make {total}",
            Exit.REFUSED,
        )


def _section(session: Session) -> TeacherTrainSection:
    section = session.recipe.train_teacher
    output = section.output or session.store.at("teacher").url
    if output.startswith("s3://"):
        raise JobError(
            f"train_teacher.output is {output}; expected a local folder (empty: <run.dir>/teacher)",
            Exit.USAGE,
        )
    start_from = section.start_from and resolve_shipped(section.start_from)
    pixel = section.pixel
    if section.data == "cifar10":  # workers may have another working directory
        path = open_store(pixel.path, session.recipe.storage).url
        pixel = pixel.model_copy(update={"path": path})
    changes = {"output": output, "start_from": start_from, "pixel": pixel}
    section = section.model_copy(update=changes)
    if start_from and not _trained_steps(session):
        _check_start(section)
    return section


def _check_start(section: TeacherTrainSection) -> None:
    """Fail at the door: is `start_from` a pipeline folder of the sizes that this run has?"""
    from dmd_core.families import family_of
    from dmd_core.teacher import check_teacher

    check_teacher(section.start_from)
    folder = Path(section.start_from)
    found = family_of(folder).pipeline
    if found != "StableDiffusionPipeline":
        raise JobError(
            f"train_teacher.start_from {folder} is a {found}; expected a StableDiffusionPipeline",
            Exit.USAGE,
        )
    if folder.resolve() == Path(section.output).resolve():
        raise JobError(f"train_teacher.output is start_from itself: {folder}", Exit.USAGE)
    expected = {
        "unet": {
            "block_out_channels": list(section.unet_channels),
            "sample_size": section.image_size // 4,
        },
        "vae": {
            "block_out_channels": list(section.vae_channels),
            "sample_size": section.image_size,
        },
        "scheduler": {"prediction_type": "v_prediction"},
    }
    for part, settings in expected.items():
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        config = json.loads((folder / part / name).read_text())
        for key, value in settings.items():
            if config.get(key) != value:
                raise JobError(
                    f"train_teacher.start_from {folder}: {part} has {key} {config.get(key)}; "
                    f"this run expects {value}",
                    Exit.USAGE,
                )


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("train-teacher"))
