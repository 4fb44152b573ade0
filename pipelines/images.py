"""Station 9: evaluation pictures on Ray Data, one Parquet file for each batch of a system.

A file is whole or absent, and its folder's name is a digest of everything that decides its
content: a killed evaluation goes on where it was, and a retrained student leaves the teacher's
pictures as they are. Whoever samples a batch writes its file; only counts come back.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from pipelines.computing import prepare_computing
from pipelines.config import EvaluateSection
from pipelines.storage import Store
from pipelines.stored_images import stored_parts, write_part
from pipelines.systems import MEAN, STUDENT, Networks, SamplingPlan, SystemSampler
from pipelines.workers import workers_per_machine

# Raised by hand when a change to the code changes pictures or how they are kept; part of every
# folder's digest.
NUMERICS_VERSION = 2


@dataclass(frozen=True)
class SamplerPool:
    """Who samples: so many Ray actors with so many logical CPUs and GPUs each, or, with `actors`
    0, this process alone. `where`: what else Ray is asked for (`PlacementSection.options`)."""

    actors: int = 1
    cpus: float = 1
    gpus: float = 0
    where: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(section: EvaluateSection) -> "SamplerPool":
        return SamplerPool(
            section.actors,
            section.cpus_per_actor,
            section.gpus_per_actor,
            section.placement.options(),
        )


def image_folders(
    plan: SamplingPlan,
    prompts: tuple[str, ...],
    systems: list[str],
    *,
    teacher_revision: str,
    student_revision: str,
    mean: np.ndarray | None,
) -> dict[str, str]:
    """System → its folder below the evaluation folder, "<digest of inputs>/<system>"."""
    # The batch size is in it: a matrix product may round differently in another batch.
    shared = {
        "numerics": NUMERICS_VERSION,
        "plan": {key: value for key, value in asdict(plan).items() if key != "few_steps"},
        "prompts": prompts,
        "teacher": teacher_revision,
    }
    own = {
        STUDENT: {"student": student_revision},
        MEAN: {"mean": None if mean is None else hashlib.sha256(mean.tobytes()).hexdigest()},
    }
    folders = {}
    for system in systems:
        inputs = json.dumps(shared | own.get(system, {}), sort_keys=True)
        folders[system] = f"{hashlib.sha256(inputs.encode()).hexdigest()[:16]}/{system}"
    return folders


def make_images(
    root: Store,
    folders: dict[str, str],
    prompts: tuple[str, ...],
    plan: SamplingPlan,
    networks: Networks,
    *,
    pool: SamplerPool = SamplerPool(),
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Sample what `folders` (system → folder under `root`) do not hold yet.

    One Ray Data execution for all systems, or this process alone. `on_progress(done, total)` counts
    pictures.
    """
    batches = list(_missing_batches(root, folders, prompts, plan))
    total = len(prompts) * len(folders)
    done = total - sum(len(batch) for batch in batches)
    if on_progress is not None:
        on_progress(done, total)
    if not batches:
        return
    where = _Target(root, folders, len(prompts))
    counts = (
        _on_ray(batches, plan, networks, where, pool).iter_batches(
            batch_size=None, batch_format="pyarrow"
        )
        if pool.actors
        else map(_SamplerActor(plan, networks, where), batches)
    )
    for count in counts:
        done += sum(count["rows"].to_pylist())
        if on_progress is not None:
            on_progress(done, total)


@dataclass(frozen=True)
class _Target:
    """Where a sampler writes: `folders` under `root`, of `total` rows each."""

    root: Store
    folders: dict[str, str]
    total: int


def _on_ray(
    batches: list[pa.Table],
    plan: SamplingPlan,
    networks: Networks,
    where: _Target,
    pool: SamplerPool,
) -> ray.data.Dataset:
    context = ray.data.DataContext.get_current().copy()
    # One batch may take an hour, and so may the nodes that samplers wait for.
    context.execution_no_progress_timeout_s = -1
    with ray.data.DataContext.current(context):  # a data set keeps that of its making
        # One block is one batch, so a picture's batch mates do not depend on what was there before.
        return ray.data.from_arrow(batches).map_batches(
            _SamplerActor,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=pool.actors),
            fn_constructor_kwargs={
                "plan": plan,
                "networks": networks,
                "where": where,
                "workers": workers_per_machine(pool.actors),
            },
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            **pool.where,
        )


def _missing_batches(
    root: Store, folders: dict[str, str], prompts: tuple[str, ...], plan: SamplingPlan
) -> Iterator[pa.Table]:
    for system, folder in folders.items():
        seeds, there = plan.seeds(system, prompts), set(stored_parts(root, folder))
        for start in range(0, len(prompts), plan.batch_size):
            if start in there:
                continue
            rows = range(start, min(start + plan.batch_size, len(prompts)))
            yield pa.table(
                {
                    "system": [system] * len(rows),
                    "index": pa.array(rows, pa.int64()),
                    "prompt": [prompts[row] for row in rows],
                    "seed": pa.array([seeds[row] for row in rows], pa.int64()),
                }
            )


class _SamplerActor:
    def __init__(
        self, plan: SamplingPlan, networks: Networks, where: _Target, workers: int = 1
    ) -> None:
        prepare_computing(1)  # see `prepare_computing`
        self.threads, self.workers = networks.threads, workers
        self.sampler, self.where = SystemSampler(plan, networks.local()), where

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Sample one batch of one system and write its file; how many rows it has."""
        prepare_computing(self.threads, self.workers)
        system, start = batch["system"][0].as_py(), batch["index"][0].as_py()
        prompts = tuple(batch["prompt"].to_pylist())
        images = self.sampler(system, prompts, batch["seed"].to_pylist())
        where = self.where
        write_part(where.root, where.folders[system], start, where.total, images)
        return pa.table({"rows": [len(prompts)]})
