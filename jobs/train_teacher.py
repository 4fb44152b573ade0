"""`dmd train-teacher`: the miniature Stable Diffusion from captioned emoji, with Ray Train."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from dmd_core.checkpoint import committed_steps
from jobs.config import resolve_shipped
from jobs.errors import Exit, JobError
from jobs.session import Session
from pipelines.config import TeacherTrainSection

CHECKPOINTS = "teacher_checkpoints"
CARD = "README.md"


def run(session: Session) -> dict[str, Any]:
    """Train VAE and UNet, write the pipeline folder, its gallery and its model card."""
    section = _section(session)
    session.open_run()
    total = section.vae_steps + section.unet_steps
    if (Path(section.output) / CARD).exists():
        steps = committed_steps(session.store.fs, session.store.path(CHECKPOINTS))
        if steps and steps[-1] >= total:
            session.display.done(f"train-teacher: nothing to do, {section.output} is complete")
            return {"teacher": section.output, "trained": False}
    from pipelines.teacher_training import train_teacher_loop
    from pipelines.workers import run_worker_group

    started = time.monotonic()
    with session.watch("train-teacher", total, "steps") as board:
        run_worker_group(
            train_teacher_loop,
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
        )
    from pipelines.teacher_card import write_card

    session.display.say("train-teacher: measuring seen and held-out captions")
    effort = (
        f"Trained on {section.num_workers} worker(s) of a machine with {os.cpu_count()} cores "
        f"({platform.processor() or platform.machine()}); the last start took "
        f"{time.monotonic() - started:.0f} s."
    )
    figures = write_card(section, seed=session.recipe.run.seed, effort=effort)
    session.display.done(f"train-teacher: {section.output}")
    return {"teacher": section.output, "trained": True, **figures}


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; touches nothing."""
    section = _section(session)
    return {
        "vae_steps": section.vae_steps,
        "unet_steps": section.unet_steps,
        "pictures_seen": section.vae_steps * section.vae_batch_size
        + section.unet_steps * section.unet_batch_size,
        "writes_to": section.output,
    }


def _section(session: Session) -> TeacherTrainSection:
    section = session.recipe.train_teacher
    output = section.output or session.store.path("teacher")
    if output.startswith("s3://"):
        raise JobError(f"train_teacher.output is {output}; expected a local folder", Exit.USAGE)
    start_from = section.start_from and resolve_shipped(section.start_from)
    section = section.model_copy(update={"output": output, "start_from": start_from})
    if start_from and not committed_steps(session.store.fs, session.store.path(CHECKPOINTS)):
        _check_start(section)
    return section


def _check_start(section: TeacherTrainSection) -> None:
    """Fail at the door: is `start_from` a pipeline folder of the sizes that this run has?"""
    from dmd_core.teacher import check_teacher

    check_teacher(section.start_from)
    folder = Path(section.start_from)
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
        found = json.loads((folder / part / name).read_text())
        for key, value in settings.items():
            if found.get(key) != value:
                raise JobError(
                    f"train_teacher.start_from {folder}: {part} has {key} {found.get(key)}; "
                    f"this run expects {value}",
                    Exit.USAGE,
                )


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("train-teacher"))
