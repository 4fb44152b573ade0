"""From a run's checkpoint to its student as a diffusers pipeline folder on this machine's disk."""

import hashlib
from typing import Any

import torch

from dmd_core.checkpoint import (
    MARKER,
    Checkpoint,
    CheckpointError,
    checkpoint_path,
    load_checkpoint,
)
from dmd_core.export import export_student
from dmd_core.teacher import Teacher
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import Store
from pipelines.train_config import TrainSection
from pipelines.train_settings import lora_settings

AVERAGE, LAST = "moving average", "last step"


def checkpoint_digest(store: Store, step: int) -> str:
    """sha256 of the marker of the run's checkpoint `step`, which holds the size and sha256 of every
    file: after a rollback the same step is another checkpoint. Raises `FileNotFoundError`."""
    marker: Any = store.fs.cat_file(f"{checkpoint_path(store.path(CHECKPOINTS), step)}/{MARKER}")
    return hashlib.sha256(marker).hexdigest()


def load_student(store: Store, folder: str, step: int) -> Checkpoint:
    """The student's weights alone, of the checkpoint `step` in `<store>/<folder>`. Raises
    `CheckpointError`."""
    root = store.path(folder)
    found = load_checkpoint(store.fs, root, step, only=("generator", "ema"))
    if found is None:
        raise CheckpointError(f"{store.url}/{folder} has no checkpoint of step {step}")
    return found


def weights_kind(checkpoint: Checkpoint) -> str:
    return AVERAGE if "ema" in checkpoint.parts else LAST


def called_at(section: TrainSection, teacher: Teacher) -> tuple[int, ...]:
    """The times at which the student is called."""
    return section.student_timesteps or (teacher.schedule.num_timesteps - 1,)


def export_checkpoint(
    teacher: Teacher,
    checkpoint: Checkpoint,
    target: str,
    section: TrainSection,
    card: dict[str, Any],
) -> None:
    """Write the local folder `target`: the moving average where there is one."""
    weights = checkpoint.parts.get("ema") or checkpoint.parts["generator"]
    export_student(
        teacher,
        weights,
        target,
        timesteps=called_at(section, teacher),
        card=card,
        dtype=torch.float32,
        lora=lora_settings(section),
    )
