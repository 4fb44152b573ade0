"""Station 9: evaluation pictures on Ray Data, one Parquet file per system.

A file is whole or absent, and its folder's name is a digest of everything that decides its
content: a killed evaluation goes on where it was, and a retrained student leaves the teacher's
pictures as they are.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from dmd_core.files import write_atomic
from pipelines.config import EvaluateSection
from pipelines.storage import Store
from pipelines.systems import MEAN, STUDENT, Images, Networks, SamplingPlan, SystemSampler
from pipelines.workers import set_threads

# Raised by hand when a change to the code changes pictures; part of every file's digest.
NUMERICS_VERSION = 1
_ARRAYS = {"latents": np.float32, "pictures": np.uint8, "features": np.float32}


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


def image_files(
    plan: SamplingPlan,
    prompts: tuple[str, ...],
    systems: list[str],
    *,
    teacher_revision: str,
    student_revision: str,
    mean: np.ndarray | None,
) -> dict[str, str]:
    """System → its file below the evaluation folder, "<digest of inputs>/<system>.parquet"."""
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
    files = {}
    for system in systems:
        inputs = json.dumps(shared | own.get(system, {}), sort_keys=True)
        files[system] = f"{hashlib.sha256(inputs.encode()).hexdigest()[:16]}/{system}.parquet"
    return files


def make_images(
    root: Store,
    files: dict[str, str],
    prompts: tuple[str, ...],
    plan: SamplingPlan,
    networks: Networks,
    *,
    pool: SamplerPool = SamplerPool(),
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Sample every system of `files` (system → path under `root`) that has no file yet.

    One Ray Data execution for all of them, or this process alone; a system's file appears when its
    last picture is there. `on_progress(done, total)` counts pictures.
    """
    missing = [system for system, path in files.items() if not root.fs.exists(root.path(path))]
    if not missing:
        return
    batches = _batches(missing, prompts, plan)
    tables = (
        _on_ray(batches, plan, networks, pool)
        if pool.actors
        else map(_SamplerActor(plan, networks), batches)
    )
    parts: dict[str, list[pa.Table]] = {system: [] for system in missing}
    done = 0
    for table in tables:
        done += len(table)
        if on_progress is not None:
            on_progress(done, len(prompts) * len(missing))
        for system in table["system"].unique().to_pylist():
            parts[system].append(table.filter(pc.equal(table["system"], system)))
            if sum(len(part) for part in parts[system]) == len(prompts):
                whole = pa.concat_tables(parts.pop(system)).sort_by("index")
                write_atomic(root.fs, root.path(files[system]), _parquet(whole))
    if parts:
        raise RuntimeError(f"pictures of {', '.join(parts)} did not all come back from Ray Data")


def _on_ray(
    batches: Iterator[pa.Table], plan: SamplingPlan, networks: Networks, pool: SamplerPool
) -> Iterator[pa.Table]:
    # One block is one batch, so a picture's batch mates do not depend on what was there before.
    dataset = ray.data.from_arrow(list(batches)).map_batches(
        _SamplerActor,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=pool.actors),
        fn_constructor_kwargs={"plan": plan, "networks": networks},
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        **pool.where,
    )
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def _batches(
    systems: list[str], prompts: tuple[str, ...], plan: SamplingPlan
) -> Iterator[pa.Table]:
    for system in systems:
        seeds = plan.seeds(system, prompts)
        for start in range(0, len(prompts), plan.batch_size):
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
    def __init__(self, plan: SamplingPlan, networks: Networks) -> None:
        set_threads(networks.threads)
        self.sampler = SystemSampler(plan, networks.local())

    def __call__(self, batch: pa.Table) -> pa.Table:
        system = batch["system"][0].as_py()
        prompts = tuple(batch["prompt"].to_pylist())
        images = self.sampler(system, prompts, batch["seed"].to_pylist())
        shapes = {name: getattr(images, name).shape[1:] for name in _ARRAYS}
        for name in _ARRAYS:
            batch = batch.append_column(name, _raw_rows(getattr(images, name)))
        return batch.append_column("shapes", pa.array([json.dumps(shapes)] * len(batch)))


def _raw_rows(array: np.ndarray) -> pa.Array:
    """(N,…) → N byte strings. (List-encoded tensors read many times slower from Parquet.)"""
    rows = np.ascontiguousarray(array)
    return pa.array([row.tobytes() for row in rows], pa.binary(rows[0].nbytes))


def _parquet(table: pa.Table) -> bytes:
    """The file's bytes; the arrays' shapes go from their column into the schema's metadata."""
    shapes = table["shapes"].unique().to_pylist()
    if len(shapes) != 1:
        raise ValueError(f"pictures of one system have different shapes: {', '.join(shapes)}")
    table = table.drop_columns(["shapes"]).replace_schema_metadata({"shapes": shapes[0]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_images(root: Store, path: str) -> Images:
    """One system's file, in the order of the prompts."""
    with root.arrow.open_input_file(root.path(path)) as file:
        table = pq.read_table(file)
    try:
        shapes = json.loads(table.schema.metadata[b"shapes"])
        arrays = {
            name: np.frombuffer(b"".join(table[name].to_pylist()), dtype).reshape(-1, *shapes[name])
            for name, dtype in _ARRAYS.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{root.path(path)} is not a file of evaluation pictures") from error
    return Images(tuple(table["prompt"].to_pylist()), tuple(table["seed"].to_pylist()), **arrays)
