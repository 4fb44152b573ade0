"""`dmd export`: newest checkpoint → `<run>/student/`, a plain diffusers pipeline (station 8)."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from dmd_core.checkpoint import committed_steps, load_checkpoint
from dmd_core.export import export_student
from dmd_core.files import is_local
from dmd_core.teacher import load_teacher
from jobs.errors import JobError
from jobs.session import Session
from jobs.train import CHECKPOINTS

STUDENT, EXPORTED = "student", "student.json"


def run(session: Session) -> dict[str, Any]:
    """Export the newest checkpoint; nothing to do when that one is exported already."""
    store = session.store
    steps = committed_steps(store.fs, store.path(CHECKPOINTS))
    if not steps:
        raise JobError(f"{store.url} has no checkpoint; run `dmd train` with this recipe first")
    done = session.read_json(EXPORTED)
    if done is not None and done["step"] == steps[-1]:
        session.display.done(f"export: nothing to do, step {steps[-1]} is in {done['student']}")
        return done
    checkpoint = load_checkpoint(store.fs, store.path(CHECKPOINTS), steps[-1])
    assert checkpoint is not None
    teacher = load_teacher(session.teacher_dir)
    card = {
        "step": checkpoint.step,
        "teacher_revision": teacher.revision,
        "pairs_digest": checkpoint.state["pairs_digest"],
        "pairs_segments": checkpoint.state.get("pairs_segments", []),
        "train": session.recipe.train.model_dump(),
        "pairs": session.recipe.pairs.model_dump(),
    }
    timesteps = session.recipe.train.student_timesteps or (teacher.schedule.num_timesteps - 1,)
    weights = checkpoint.parts.get("ema", checkpoint.parts["generator"])
    _write(session, teacher, weights, timesteps, card)
    result = {
        "step": checkpoint.step,
        "num_inference_steps": len(timesteps),
        "weights": "moving average" if "ema" in checkpoint.parts else "last step",
        "student": store.path(STUDENT) if is_local(store.fs) else f"{store.url}/{STUDENT}",
        "pairs_digest": checkpoint.state["pairs_digest"],
        "teacher_revision": teacher.revision,
    }
    session.write_json(EXPORTED, result)
    session.display.done(f"export: step {checkpoint.step} → {result['student']}")
    return result


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; touches nothing."""
    steps = committed_steps(session.store.fs, session.store.path(CHECKPOINTS))
    return {
        "checkpoint_step": steps[-1] if steps else "none yet",
        "writes_to": f"{session.store.url}/{STUDENT}",
    }


def _write(
    session: Session, teacher, weights, timesteps: tuple[int, ...], card: dict[str, Any]
) -> None:
    from pipelines.train_settings import lora_settings

    store = session.store
    settings: dict[str, Any] = {
        "timesteps": timesteps,
        "card": card,
        "dtype": torch.float32,
        "lora": lora_settings(session.recipe.train),
    }
    if is_local(store.fs):
        store.fs.makedirs(store.root, exist_ok=True)
        export_student(teacher, weights, store.path(STUDENT), **settings)
        return
    with tempfile.TemporaryDirectory(prefix="dmd-export-") as folder:
        local = Path(folder) / STUDENT
        export_student(teacher, weights, str(local), **settings)
        store.fs.put(f"{local}/", f"{store.path(STUDENT)}/", recursive=True)


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("export"))
