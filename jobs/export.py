"""`dmd export`: a checkpoint → `<run>/student/`, a plain diffusers pipeline (station 8)."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from dmd_core.checkpoint import committed_steps
from dmd_core.files import is_local
from dmd_core.teacher import Teacher, load_teacher, teacher_revision
from jobs.errors import Exit, JobError
from jobs.session import Session
from pipelines.beside_results import BEST
from pipelines.commits import delete_if_there
from pipelines.local_folders import nearby
from pipelines.run_folder import CHECKPOINTS
from pipelines.student_export import (
    called_at,
    checkpoint_digest,
    export_checkpoint,
    load_student,
    teacher_origin,
    weights_kind,
)

STUDENT, EXPORTED = "student", "student.json"
LAST_CHECKPOINT, BEST_CHECKPOINT = "last", "best"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dmd export` takes beside the common options."""
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        help="best (by train.evaluation.metric), last, or a step; default: the best where the run "
        "was evaluated while it trained, else the last",
    )


def run(session: Session) -> dict[str, Any]:
    """Export the chosen checkpoint; nothing to do when that one is exported already. Returns the
    content of student.json, and where the student is: not in the file, for a run may be moved."""
    store = session.store
    place = {"student": store.at(STUDENT).url}
    steps = committed_steps(store.fs, store.path(CHECKPOINTS))
    if not steps:
        raise JobError(f"{store.url} has no checkpoint; run `dmd train` with this recipe first")
    session.check_settings()
    step, why = _chosen(session, steps)
    done, digest = _exported(session), checkpoint_digest(store, step)
    if done is not None and (done["step"], done.get("checkpoint_digest")) == (step, digest):
        session.display.done(f"export: nothing to do, step {step} is in {place['student']}")
        return done | place
    checkpoint, pairs = load_student(store, CHECKPOINTS, step), session.recipe.pairs
    teacher = load_teacher(session.teacher_dir, size=(pairs.height, pairs.width))
    check_teacher_revision(session, teacher.revision, checkpoint.state["teacher_revision"])
    card = {
        "step": step,
        "checkpoint": why,
        "teacher_revision": teacher.revision,
        "pairs_digest": checkpoint.state["pairs_digest"],
        "pairs_segments": checkpoint.state.get("pairs_segments", []),
        "train": session.recipe.train.model_dump(),
        "pairs": session.recipe.pairs.model_dump(),
    }
    revision = _write(session, teacher, checkpoint, card)
    result = {
        "step": step,
        "checkpoint": why,
        "checkpoint_digest": digest,
        "num_inference_steps": len(called_at(session.recipe.train, teacher)),
        "weights": weights_kind(checkpoint),
        "pairs_digest": checkpoint.state["pairs_digest"],
        "teacher_revision": teacher.revision,
        "student_revision": revision,
    }
    session.write_json(EXPORTED, result)
    session.display.done(f"export: step {step} ({why}) → {place['student']}")
    return result | place


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; touches nothing."""
    steps = committed_steps(session.store.fs, session.store.path(CHECKPOINTS))
    step, why = _chosen(session, steps) if steps else ("none yet", "")
    return {
        "checkpoint_step": step,
        "checkpoint": why,
        "writes_to": f"{session.store.url}/{STUDENT}",
    }


def check_teacher_revision(session: Session, found: str, trained: str) -> None:
    """Refuse a teacher that is not the one that the run was trained from."""
    if found != trained:
        raise JobError(
            f"teacher.path {session.recipe.teacher.path} has revision {found[:12]}…, "
            f"{session.store.url} was trained from {trained[:12]}…; give that teacher",
            Exit.REFUSED,
        )


def check_student(session: Session, exported: dict[str, Any]) -> str:
    """The URL of the student in the run's folder. Refuses one that is not that of `exported`, the
    content of student.json."""
    student, store = session.store.at(STUDENT), session.store
    if not store.fs.exists(student.path("model_index.json")):
        raise JobError(f"{student.url} is gone; run `dmd export` with this recipe again")
    found, expected = teacher_revision(nearby(student)), exported.get("student_revision")
    if expected is None:  # by a release that did not take it
        raise JobError(f"{store.url}/{EXPORTED} has no student_revision; run `dmd export` again")
    if found != expected:
        raise JobError(
            f"{student.url} has revision {found[:12]}…, {EXPORTED} beside it is of "
            f"{expected[:12]}…: the student was changed after its export. Remove {EXPORTED}, and "
            "run `dmd export` again"
        )
    return student.url


def _exported(session: Session) -> dict[str, Any] | None:
    """What `run` left, where the student is still there."""
    done, store = session.read_json(EXPORTED), session.store
    if done is None or "student_revision" not in done:
        return None
    return done if store.fs.exists(store.path(STUDENT, "model_index.json")) else None


def _chosen(session: Session, steps: list[int]) -> tuple[int, str]:
    """The step to export, and why this one, in words. `steps`: those that have a checkpoint."""
    asked = getattr(session.arguments, "checkpoint", None)
    best = session.read_json(BEST) if asked in (None, BEST_CHECKPOINT) else None
    if asked == LAST_CHECKPOINT or (asked is None and (best is None or best["step"] not in steps)):
        return steps[-1], "the last"
    if asked in (None, BEST_CHECKPOINT):
        if best is None:
            raise JobError(
                f"{session.store.url} has no {BEST}: no checkpoint was evaluated while it trained "
                "(train.evaluation.steps); expected --checkpoint last or a step"
            )
        step, why = best["step"], f"the best by {best['metric']}, {best['value']:.4g}"
    elif asked.isdecimal():
        step, why = int(asked), "as asked"
    else:
        raise JobError(f"--checkpoint {asked}: expected best, last or a step", Exit.USAGE)
    if step not in steps:
        raise JobError(f"{session.store.url} has no checkpoint of step {step}; it has {steps}")
    return step, why


def _write(session: Session, teacher: Teacher, checkpoint, card: dict[str, Any]) -> str:
    """Returns the digest of what was written. Until it is there in full nothing says it is: what
    says so of an older student goes first."""
    store, section = session.store, session.recipe.train
    origin = teacher_origin(session.teacher_url, session.teacher_dir, session.recipe.storage)
    delete_if_there(store, store.path(EXPORTED))
    if is_local(store.fs):
        store.fs.makedirs(store.root, exist_ok=True)
        export_checkpoint(teacher, checkpoint, store.path(STUDENT), section, card, origin)
        return teacher_revision(store.path(STUDENT))
    with tempfile.TemporaryDirectory(prefix="dmd-export-") as folder:
        local = Path(folder) / STUDENT
        export_checkpoint(teacher, checkpoint, str(local), section, card, origin)
        if store.fs.exists(store.path(STUDENT)):
            store.fs.rm(store.path(STUDENT), recursive=True)
        store.fs.put(f"{local}/", f"{store.path(STUDENT)}/", recursive=True)
        return teacher_revision(str(local))


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("export"))
