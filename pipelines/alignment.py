"""Station 9: the CLIP score of teacher and student on the same held-out prompts."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dmd_core.clip_score import CLIP_FILES, ClipError, ClipScorer, check_clip, clip_revision
from dmd_core.metrics import mean_estimate
from pipelines.computing import prepare_computing
from pipelines.config import StorageSection
from pipelines.feature_parts import Progress, counted, in_parts
from pipelines.hub import hub_folder, is_hub_id, pinned
from pipelines.images import SamplerPool
from pipelines.local_folders import nearby
from pipelines.storage import Store, open_store
from pipelines.stored_images import Pictures, open_images
from pipelines.systems import STUDENT, TEACHER, Networks
from pipelines.timing import NOT_MEASURED
from pipelines.unit import Unit
from pipelines.workers import workers_per_machine


def clip_folder(name: str, storage: StorageSection) -> str:
    """`evaluate.clip_model` as a local folder, checked: a path, an s3:// URL, or org/name@<commit>
    of a hub. Raises `ClipError` and `HubError`."""
    if is_hub_id(name.partition("@")[0]):
        folder = str(hub_folder(*pinned(name), CLIP_FILES))
    else:
        try:
            folder = nearby(open_store(name, storage))
        except FileNotFoundError as error:
            raise ClipError(
                f"evaluate.clip_model {name} does not exist; expected a CLIP model folder, an "
                "s3:// URL of one, or org/name@<commit> of a hub"
            ) from error
    check_clip(folder)
    return folder


def alignment(
    clip_model: str,
    networks: Networks,
    root: Store,
    folders: Mapping[str, str],
    *,
    unit: Unit,
    pool: SamplerPool,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Mean CLIP scores of teacher and student over prompts with their intervals, and that of
    student − teacher, prompt by prompt: what both find hard cancels. Plain JSON; or why it is not
    measured. `clip_model` "": none is given.

    The scores are kept beside the pictures, in parts as they are computed on the pool's workers.
    """
    if not clip_model:
        return {"clip_score": f"{NOT_MEASURED}: evaluate.clip_model names no CLIP model"}
    revision = clip_revision(clip_folder(clip_model, networks.storage))
    images = {system: open_images(root, folders[system]) for system in (TEACHER, STUDENT)}
    workers = workers_per_machine(pool.actors) if pool.actors else 1
    on_rows = counted(sum(len(entry.prompts) for entry in images.values()), on_progress)
    scores = {
        system: in_parts(
            partial(_clip, clip_model, networks, workers), entry, pool,
            row=(), store=root, folder=f"{folders[system]}.clip-{revision[:16]}", on_rows=on_rows,
        )
        for system, entry in images.items()
    }  # fmt: skip
    interval = unit.of(images[TEACHER].prompts)
    difference = mean_estimate(scores[STUDENT] - scores[TEACHER], **interval)
    return {
        "clip_score": {
            system: asdict(mean_estimate(values, **interval)) for system, values in scores.items()
        },
        "clip_score_difference": asdict(difference),
        "clip_model": clip_model if "@" in clip_model else Path(clip_model).name,
        "clip_revision": revision,
    }


def _clip(clip_model: str, networks: Networks, workers: int) -> Callable[[Pictures], np.ndarray]:
    """Of a worker that shares its machine with the other ones of `workers`."""
    prepare_computing(networks.threads, workers)
    scorer = ClipScorer(clip_folder(clip_model, networks.storage), networks.device)

    def scores(images: Pictures) -> np.ndarray:
        found = [scorer(part.pictures, part.prompts) for part in images.parts()]
        return np.concatenate(found)

    return scores
