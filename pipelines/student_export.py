"""From a run's checkpoint to its student as a diffusers pipeline folder on this machine's disk."""

import hashlib
from typing import Any

import torch

from dmd_core.checkpoint import (
    MARKER,
    Checkpoint,
    checkpoint_path,
    load_checkpoint,
    stored_tensors,
)
from dmd_core.export import export_student
from dmd_core.families import read_index
from dmd_core.files import store_errors
from dmd_core.model_card import UNKNOWN, Origin, card_credit, card_terms
from dmd_core.teacher import Teacher
from pipelines.config import StorageSection
from pipelines.hub import HubError, hub_file
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import Store, open_store
from pipelines.teacher_source import TeacherSource
from pipelines.train_config import TrainSection
from pipelines.train_settings import lora_settings

AVERAGE, LAST = "moving average", "last step"
_CARD = "README.md"


def checkpoint_digest(store: Store, step: int) -> str:
    """sha256 of the marker of the run's checkpoint `step`, which holds the size and sha256 of every
    file: after a rollback the same step is another checkpoint. Raises `FileNotFoundError`."""
    marker: Any = store.fs.cat_file(f"{checkpoint_path(store.path(CHECKPOINTS), step)}/{MARKER}")
    return hashlib.sha256(marker).hexdigest()


def load_student(store: Store, folder: str, step: int) -> Checkpoint:
    """Of the checkpoint `step` in `<store>/<folder>` what is exported: the student's moving average
    where there is one, else its weights. Raises `CheckpointError`."""
    root = store.path(folder)
    parts = stored_tensors(store.fs, root, step)
    part = "ema" if "ema" in parts else "generator"
    found = load_checkpoint(store.fs, root, step, only=(part,))
    assert found is not None  # of a step that is asked for, there is one or an error
    return found


def weights_kind(checkpoint: Checkpoint) -> str:
    return AVERAGE if "ema" in checkpoint.parts else LAST


def called_at(section: TrainSection, teacher: Teacher) -> tuple[int, ...]:
    """The times at which the student is called."""
    return section.student_timesteps or (teacher.schedule.num_timesteps - 1,)


def teacher_origin(url: str, folder: str, storage: StorageSection | None = None) -> Origin:
    """What a student's card says of the teacher of `TeacherSource.url`. `folder`: its local copy,
    which has no card where it was fetched. A card that cannot be had says nothing."""
    source = TeacherSource.from_url(url)
    text, checker = _card_of(source, storage), read_index(folder).get("safety_checker")
    return Origin(
        terms=card_terms(text),
        credit=card_credit(text),
        hub_id=source.path if source.revision else "",
        revision=source.revision,
        safety_checker=isinstance(checker, list) and any(checker),
    )


def _card_of(source: TeacherSource, storage: StorageSection | None) -> str:
    if source.config:  # a single file
        return ""
    try:
        if source.revision:
            data: Any = hub_file(source.path, source.revision, _CARD).read_bytes()
        else:
            store = open_store(source.path, storage)
            data = store.fs.cat_file(store.path(_CARD))
    except (HubError, *store_errors()):
        return ""
    return data.decode("utf-8-sig", errors="replace")


def export_checkpoint(
    teacher: Teacher,
    checkpoint: Checkpoint,
    target: str,
    section: TrainSection,
    card: dict[str, Any],
    origin: Origin = UNKNOWN,
) -> None:
    """Write the local folder `target` from what `load_student` has read."""
    (weights,) = checkpoint.parts.values()
    export_student(
        teacher,
        weights,
        target,
        timesteps=called_at(section, teacher),
        card=card,
        dtype=torch.float32,
        lora=lora_settings(section),
        origin=origin,
    )
