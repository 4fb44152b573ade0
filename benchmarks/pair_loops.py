"""What `benchmarks.pairs` measures: each piece of work runs in a fresh process of its own.

    python -m benchmarks.pair_loops <work> '<JSON>'

prints one line of JSON at the end. A batch is noted as (process, monotonic seconds, rows) when its
rows are encoded: at the same point of the factory's workers and of the loops written by hand.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import ray
import torch

from benchmarks.pair_sets import land, landing, made_pairs, reading, sealing
from dmd_core.noise import sample_noise
from dmd_core.ode import make_scheduler
from dmd_core.teacher import load_teacher
from dmd_core.types import PairBatch
from jobs.config import Recipe, load_recipe, resolve_shipped
from jobs.pairs import pair_order
from jobs.session import open_session
from pipelines.computing import prepare_computing
from pipelines.factory import fill_order
from pipelines.pairs import encode_pairs, fingerprint_of, library_versions
from pipelines.progress import Counters
from pipelines.storage import open_store

Stamp = tuple[int, float, int]
READY = "ready"
RESULT = "result "


@ray.remote(num_cpus=0)
class _Stamps(Counters):
    """A ProgressBoard that also keeps when each batch was done."""

    def __init__(self) -> None:
        super().__init__()
        self._stamps: list[Stamp] = []

    def stamp(self, stamp: Stamp) -> None:
        self._stamps.append(stamp)

    def stamps(self) -> list[Stamp]:
        return self._stamps


class _Advance:
    """Notes the time where the batch was made, not where the message arrives."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def remote(self, count: int, rejected: int = 0, busy_s: float = 0.0) -> None:
        self._actor.stamp.remote((os.getpid(), time.monotonic(), count))
        self._actor.advance.remote(count, rejected, busy_s)


class _Board:
    def __init__(self, actor: Any) -> None:
        self._actor, self.advance = actor, _Advance(actor)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._actor, name)


# ---------------------------------------------------------------- pairs per second


def factory(work: dict[str, Any]) -> dict[str, Any]:
    """What `dmd pairs` does, its display apart, with an embedded Ray."""
    stamps: list[Stamp] = []
    with open_session(work["config"], work["overrides"], quiet=True) as session:

        @contextmanager
        def watch(rows: int) -> Iterator[Any]:
            session.start_ray()
            actor = _Stamps.remote()
            yield _Board(actor)
            stamps.extend(ray.get(actor.stamps.remote()))

        outcome = fill_order(pair_order(session), watch, purpose="benchmark")
    if outcome.manifest.rejected:
        raise RuntimeError(f"the teacher rejected {outcome.manifest.rejected} rows")
    return {"stamps": stamps}


def hand_written(work: dict[str, Any]) -> dict[str, Any]:
    """Read rows, draw noise, `Teacher.solve`, encode, write a Parquet file per block."""
    recipe, device = _start(work)
    section = recipe.pairs
    teacher = load_teacher(
        resolve_shipped(recipe.teacher.path),
        device=device,
        compute_dtype=_dtype(section.compute_dtype),
    )
    fingerprint, versions = fingerprint_of(section, teacher.revision), library_versions()
    shape, dtype = teacher.latent_shape(section.height, section.width), _dtype(section.dtype)
    rows, folder = _own_rows(work, recipe), Path(work["folder"])
    _wait_for_go(work)
    stamps: list[Stamp] = []
    for start in range(0, len(rows), section.rows_per_block):
        tables = []
        for first in range(start, start + section.rows_per_block, section.batch_size):
            batch = rows.slice(first, section.batch_size)
            ids, prompts, seeds = (batch[n].to_pylist() for n in ("pair_id", "prompt", "seed"))
            noise = sample_noise(seeds, shape, dtype)
            latents = teacher.solve(
                noise,
                prompts,
                solver=section.solver,
                steps=section.steps,
                guidance_scale=section.guidance_scale,
                negative_prompt=section.negative_prompt,
            )
            pairs = PairBatch(tuple(ids), tuple(prompts), noise, latents.to("cpu", dtype))
            tables.append(encode_pairs(pairs, seeds, fingerprint=fingerprint, provenance=versions))
            stamps.append((os.getpid(), time.monotonic(), len(ids)))
        path = folder / f"{start:08d}.parquet"
        pq.write_table(pa.concat_tables(tables), path, row_group_size=section.row_group_rows)
    return {"stamps": stamps}


def pipeline_calls(work: dict[str, Any]) -> dict[str, Any]:
    """`StableDiffusionPipeline.__call__` as it comes, to latents; nothing is stored."""
    from diffusers import StableDiffusionPipeline

    recipe, device = _start(work)
    section, size = recipe.pairs, work["batch_size"]
    pipeline = StableDiffusionPipeline.from_pretrained(
        resolve_shipped(recipe.teacher.path),
        safety_checker=None,
        requires_safety_checker=False,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(section.solver, pipeline.scheduler.config)
    mixed: AbstractContextManager = nullcontext()
    if section.compute_dtype != "float32":
        mixed = torch.autocast(device, dtype=_dtype(section.compute_dtype))
    prompts = _own_rows(work, recipe)["prompt"].to_pylist()
    generator = torch.Generator(device).manual_seed(section.seed)
    stamps: list[Stamp] = []
    for start in range(0, len(prompts), size):
        with mixed:
            found = pipeline(
                prompts[start : start + size],
                negative_prompt=[section.negative_prompt] * size,
                height=section.height,
                width=section.width,
                num_inference_steps=section.steps,
                guidance_scale=section.guidance_scale,
                generator=generator,
                output_type="latent",
            )
        found.images.cpu()
        stamps.append((os.getpid(), time.monotonic(), size))
        if len(stamps) > 2 and stamps[-1][1] - stamps[0][1] > work["limit_s"]:
            break
    return {"stamps": stamps}


def _start(work: dict[str, Any]) -> tuple[Recipe, str]:
    recipe = load_recipe(work["config"], work["overrides"])
    prepare_computing(recipe.pairs.threads_per_actor)
    os.makedirs(work["folder"], exist_ok=True)
    return recipe, "cuda" if recipe.pairs.gpus_per_actor and torch.cuda.is_available() else "cpu"


def _own_rows(work: dict[str, Any], recipe: Recipe) -> pa.Table:
    """This process's share of the landed rows."""
    landed = land(recipe.pairs, open_store(work["folder"]))
    rows = pq.read_table(landed.files[0].path)
    part, parts = work.get("part", (0, 1))
    share = len(rows) // parts
    return rows.slice(part * share, share)


def _wait_for_go(work: dict[str, Any]) -> None:
    """Processes that are to work at the same time start together."""
    if work.get("wait"):
        print(READY, flush=True)
        sys.stdin.readline()


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


# ---------------------------------------------------------------- the process


def about(work: dict[str, Any]) -> dict[str, Any]:
    """The device and the shape of the teacher's latents."""
    recipe = load_recipe(work["config"], work["overrides"])
    teacher = load_teacher(resolve_shipped(recipe.teacher.path))
    cuda = torch.cuda.is_available()
    return {
        "cuda": torch.cuda.get_device_name(0) if cuda else None,
        "shape": teacher.latent_shape(recipe.pairs.height, recipe.pairs.width),
        "batch_size": recipe.pairs.batch_size,
        "rows_per_block": recipe.pairs.rows_per_block,
        "row_group_rows": recipe.pairs.row_group_rows,
        "steps": recipe.pairs.steps,
        "guidance_scale": recipe.pairs.guidance_scale,
    }


WORK = {
    work.__name__: work
    for work in (
        about, factory, hand_written, pipeline_calls, landing, made_pairs, sealing, reading,
    )
}  # fmt: skip


def main(name: str, content: str) -> int:
    work = json.loads(content)
    if work.get("cores") and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, work["cores"])  # what this process starts stays there too
    result = WORK[name](work)
    print(RESULT + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
