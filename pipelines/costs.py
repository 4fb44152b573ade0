"""What work will take and cost, before it is started: a rate, where it comes from, and prices.

A rate is believed in this order: what earlier work here took (a data set's versions, a run's log),
what the recipe states, what one evaluation takes on this machine. The plan says which it was.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import Field

from dmd_core.files import is_local
from pipelines.commits import StoreError, read_json
from pipelines.config import PairsSection
from pipelines.manifest import ManifestError, list_versions, load_manifest
from pipelines.manifest_model import Manifest, generation_folder
from pipelines.section import Section
from pipelines.storage import Store
from pipelines.train_config import TrainSection

Price = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
_VERSIONS = 10  # so many of the newest are asked what they took
_LINES = 20  # of a run's log: its newest
_HOUR = 3600.0


class CostSection(Section):
    """Prices and stated rates, for `--dry-run`."""

    gpu_hour: Price | None = Field(default=None, description="price of one GPU for an hour")
    cpu_hour: Price | None = Field(default=None, description="of one logical CPU for an hour")
    currency: str = Field(default="USD", pattern=r"^\w{1,8}$")
    seconds_per_picture: Seconds | None = Field(
        default=None, description="of one teacher of dmd pairs, where none was measured"
    )
    seconds_per_step: Seconds | None = Field(
        default=None, description="of the training's whole group, where none was measured"
    )
    seconds_per_teacher_step: Seconds | None = Field(
        default=None, description="of the whole group of dmd train-teacher"
    )


@dataclass(frozen=True)
class Rate:
    """`seconds` of one worker per unit of work, None: not known; `source` in words."""

    seconds: float | None
    source: str


@dataclass(frozen=True)
class Work:
    """`units` of work on `workers` at once, each with so many CPUs and GPUs while it works."""

    units: int
    workers: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class MeasuredPairs:
    """What a sealed version took: `seconds` of a teacher per picture, scaled to what is asked for
    now; `bytes` of one pair in its files, None if pairs have another form now."""

    version: int
    rows: int
    seconds: float
    bytes: float | None


def estimate(work: Work, rate: Rate, cost: CostSection) -> dict[str, Any]:
    """For a plan: the rate in words, and what follows from it. What is not known is not there."""
    plan: dict[str, Any] = {"rate": rate.source}
    if rate.seconds is None:
        return plan
    busy = work.units * rate.seconds
    hours = {"gpu": busy * work.gpus / _HOUR, "cpu": busy * work.cpus / _HOUR}
    plan["estimated_seconds"] = round(busy / work.workers)
    plan |= {f"{name}_hours": round(value, 4) for name, value in hours.items()}
    return plan | _priced(hours, cost)


def _priced(hours: dict[str, float], cost: CostSection) -> dict[str, Any]:
    """The price; start-up and nodes that wait are not in it. A GPU's price is taken for that of
    its node where CPUs have none."""
    prices = {"gpu": cost.gpu_hour, "cpu": cost.cpu_hour}
    paid = "gpu" if hours["gpu"] else "cpu"
    if hours[paid] and prices[paid] is None:
        return {"cost": f"unknown: cost.{paid}_hour is not set"}
    total = sum(hours[name] * (price or 0.0) for name, price in prices.items())
    return {"cost": round(total, 4), "currency": cost.currency}


# ---------------------------------------------------------------- pairs


def evaluations_per_picture(section: PairsSection, *, distilled: bool = False) -> int:
    """Network evaluations of one sample: Heun's second look doubles them, and so does guidance,
    where it is no input of the network (`distilled`)."""
    return _evaluations(section.solver, section.steps, not distilled and section.guidance_scale > 1)


def pair_rate(
    section: PairsSection,
    cost: CostSection,
    measured: MeasuredPairs | None,
    measure_here: Callable[[], Rate],
) -> Rate:
    """Of one teacher, per picture; `measure_here` is asked only when nothing better is known."""
    if measured is not None:
        source = f"measured on version {measured.version} ({measured.rows} pairs)"
        return Rate(measured.seconds, f"{_in_words(measured.seconds)} per pair, {source}")
    stated = cost.seconds_per_picture
    if stated is not None:
        words = f"{_in_words(stated)} per pair, stated in the recipe (cost.seconds_per_picture)"
        return Rate(stated, words)
    return measure_here()


def measured_pairs(
    root: Store, section: PairsSection, fingerprint: dict[str, Any], *, distilled: bool = False
) -> MeasuredPairs | None:
    """The newest version whose making was recorded and can be compared: pictures of the same size
    in the same precision, on GPUs if there are GPUs now. `fingerprint`: of the pairs asked for;
    `distilled`: guidance is an input of the teacher's network."""
    for version in sorted(list_versions(root), reverse=True)[:_VERSIONS]:
        with contextlib.suppress(ManifestError, StoreError):
            found = _measured(root, load_manifest(root, version), section, fingerprint, distilled)
            if found is not None:
                return found
    return None


def _measured(
    root: Store,
    manifest: Manifest,
    section: PairsSection,
    fingerprint: dict[str, Any],
    distilled: bool,
) -> MeasuredPairs | None:
    folder = generation_folder(manifest.fingerprint_digest)
    record = read_json(root, root.path(folder, "runs", f"{manifest.fence:06d}.json"))
    then = manifest.fingerprint
    alike = all(then.get(k) == fingerprint[k] for k in ("height", "width", "compute_dtype"))
    if record is None or not alike:
        return None
    rows, busy = record.get("rows", 0), record.get("busy_s", 0.0)
    same_device = (record.get("gpu_s", 0.0) > 0) == (section.gpus_per_actor > 0)
    if rows <= 0 or busy <= 0 or not same_device:
        return None
    twice = not distilled and then["guidance_scale"] > 1
    evaluations = _evaluations(then["solver"], then["steps"], twice)
    scale = evaluations_per_picture(section, distilled=distilled) / evaluations
    stored = sum(file.rows for file in manifest.files)
    same_form = all(then.get(k) == fingerprint[k] for k in ("dtype", "teacher_revision"))
    size = sum(file.bytes for file in manifest.files) / stored if same_form else None
    return MeasuredPairs(manifest.version, rows, busy / rows * scale, size)


def _evaluations(solver: str, steps: int, twice: bool) -> int:
    calls = {"heun": 2 * steps - 1, "edm_heun": 2 * steps - 1, "pndm": steps + 1}
    return calls.get(solver, steps) * (2 if twice else 1)


# ---------------------------------------------------------------- training


def step_rate(store: Store, section: TrainSection, cost: CostSection) -> Rate:
    """Seconds of the whole group per step: from the run's own log, else as the recipe states."""
    lines = _log_lines(store)
    stages = section.plan()
    seconds = [
        stages[min(line.get("stage") or 0, len(stages) - 1)][1].train_batch_size / rate
        for line in lines
        if (rate := line.get("samples_per_second"))
    ]
    if seconds:
        steps = f"steps {lines[0]['step']} to {lines[-1]['step']} of this run"
        per_step = median(seconds)
        return Rate(per_step, f"{_in_words(per_step)} per step, measured in {steps}")
    stated = cost.seconds_per_step
    if stated is not None:
        words = f"{_in_words(stated)} per step, stated in the recipe (cost.seconds_per_step)"
        return Rate(stated, words)
    return Rate(
        None,
        "unknown: not measured yet; a few steps of this run, or cost.seconds_per_step, tell it",
    )


def teacher_step_rate(cost: CostSection) -> Rate:
    """Seconds of the whole group per step of `dmd train-teacher`, as the recipe states."""
    stated, key = cost.seconds_per_teacher_step, "cost.seconds_per_teacher_step"
    if stated is None:
        return Rate(None, f"unknown: not measured; {key} states it")
    return Rate(stated, f"{_in_words(stated)} per step, stated in the recipe ({key})")


def _log_lines(store: Store) -> list[dict[str, Any]]:
    """The newest lines of the run's log; none if there is none."""
    try:
        raw = store.fs.cat_file(store.path("metrics.jsonl"))
        return [json.loads(line) for line in raw.splitlines()[-_LINES:]]
    except (FileNotFoundError, ValueError):
        return []


# ---------------------------------------------------------------- space


def free_bytes(store: Store) -> int | None:
    """Free space where `store` will lie; None: an object store, which does not say."""
    if not is_local(store.fs):
        return None
    folder = Path(store.root)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _in_words(seconds: float) -> str:
    return f"{seconds:.3g} s"
