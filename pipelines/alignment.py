"""Station 9: the CLIP score of teacher and student on the same held-out prompts."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray

from dmd_core.clip_score import CLIP_FILES, ClipError, ClipScorer, check_clip, clip_revision
from dmd_core.metrics import mean_estimate
from pipelines.computing import prepare_computing
from pipelines.config import StorageSection
from pipelines.hub import hub_folder, is_hub_id, pinned
from pipelines.images import SamplerPool
from pipelines.local_folders import nearby
from pipelines.storage import Store, open_store
from pipelines.stored_images import open_images
from pipelines.systems import STUDENT, TEACHER, Networks
from pipelines.timing import NOT_MEASURED
from pipelines.unit import Unit


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
) -> dict[str, Any]:
    """`measure_alignment` of the pictures of teacher and student in one Ray task, as plain JSON; or
    why it is not measured. `clip_model` "": none is given."""
    if not clip_model:
        return {"clip_score": f"{NOT_MEASURED}: evaluate.clip_model names no CLIP model"}
    measure = ray.remote(measure_alignment).options(
        num_cpus=pool.cpus, num_gpus=pool.gpus, **pool.where
    )
    chosen = {system: folders[system] for system in (TEACHER, STUDENT)}
    return ray.get(measure.remote(clip_model, networks, root, chosen, unit))


def measure_alignment(
    clip_model: str, networks: Networks, root: Store, folders: Mapping[str, str], unit: Unit
) -> dict[str, Any]:
    """Mean scores over prompts with their intervals, and that of student − teacher, prompt by
    prompt: what both find hard cancels."""
    prepare_computing(networks.threads)
    local = clip_folder(clip_model, networks.storage)
    scorer = ClipScorer(local, networks.device)
    scores = {}
    for system, folder in folders.items():
        images = open_images(root, folder)
        found = [scorer(part.pictures, part.prompts) for part in images.parts()]
        scores[system], interval = np.concatenate(found), unit.of(images.prompts)
    estimates = {
        system: asdict(mean_estimate(values, **interval)) for system, values in scores.items()
    }
    difference = mean_estimate(scores[STUDENT] - scores[TEACHER], **interval)
    return {
        "clip_score": estimates,
        "clip_score_difference": asdict(difference),
        "clip_model": clip_model if "@" in clip_model else Path(clip_model).name,
        "clip_revision": clip_revision(local),
    }
