"""Large data sets of made-up pairs: landing, sealing and reading, as `benchmarks.pairs` measures
them. Each function is the whole work of a process; see `benchmarks.pair_loops`."""

import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import torch

from cluster.local import ray_cluster
from dmd_core.teacher import teacher_revision
from dmd_core.types import PairBatch
from jobs.config import Recipe, load_recipe, resolve_shipped
from pipelines.batches import PairReader
from pipelines.bounded import map_bounded
from pipelines.config import PairsSection
from pipelines.generate import _map_on_cluster
from pipelines.manifest import load_manifest
from pipelines.manifest_model import Manifest
from pipelines.pairs import PARQUET_OPTIONS, encode_pairs, fingerprint_of, library_versions
from pipelines.prompts import LandedPrompts, PromptSource, land_prompts
from pipelines.seal import seal_generation
from pipelines.storage import Store, open_store


def landing(work: dict[str, Any]) -> dict[str, Any]:
    recipe = load_recipe(work["config"], work["overrides"])
    before, started = _peak_bytes(), time.monotonic()
    landed = land(recipe.pairs, open_store(recipe.pairs_root))
    return {
        "seconds": time.monotonic() - started,
        "rows": landed.rows,
        "peak_bytes": _peak_bytes(),
        "peak_bytes_of_imports": before,
    }


def made_pairs(work: dict[str, Any]) -> dict[str, Any]:
    """Files of random tensors for every landed row, with their ledger; `work["rows"]` to a file."""
    recipe = load_recipe(work["config"], work["overrides"])
    root, section, size = open_store(recipe.pairs_root), recipe.pairs, work["rows"]
    fingerprint = fingerprint_of(section, teacher_revision(resolve_shipped(recipe.teacher.path)))
    folders = [root.path(fingerprint.folder, part) for part in ("data", "ledger")]
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
    landed, versions = land(section, root), library_versions()
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, section.dtype)
    batches = pq.ParquetFile(landed.files[0].path).iter_batches(size)
    for number, rows in enumerate(_whole(batches, size)):
        ids, prompts, seeds = (rows[name].to_pylist() for name in ("pair_id", "prompt", "seed"))
        noise, latents = (
            torch.randn((len(ids), *work["shape"]), generator=generator).to(dtype) for _ in range(2)
        )
        pairs = PairBatch(tuple(ids), tuple(prompts), noise, latents)
        table = encode_pairs(pairs, seeds, fingerprint=fingerprint, provenance=versions)
        base = f"000001_{number:06d}"
        path = f"{folders[0]}/{base}-0.parquet"
        pq.write_table(table, path, row_group_size=section.row_group_rows, **PARQUET_OPTIONS)
        pq.write_table(pa.table({"pair_id": ids}), f"{folders[1]}/{base}.parquet")
    return {"rows": landed.rows}


def _whole(batches: Iterator[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """Tables of `size` rows: a reader's batches also end where a row group does."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        table = pa.Table.from_batches(held)
        while len(table) >= size:
            yield table.slice(0, size)
            table = table.slice(size)
        held = table.to_batches()
    if held:
        yield pa.Table.from_batches(held)


def sealing(work: dict[str, Any]) -> dict[str, Any]:
    """Seals afresh `repeats` times in threads, and as often on Ray, in turn."""
    recipe = load_recipe(work["config"], work["overrides"])
    root, settings = open_store(recipe.pairs_root), recipe.ray
    cluster = ray_cluster(
        address=settings.address,
        num_cpus=settings.num_cpus,
        object_store_bytes=settings.object_store_mb << 20,
    )
    prompts, seconds = land(recipe.pairs, root), {"threads": [], "ray": []}
    for _ in range(work["repeats"]):
        seconds["threads"].append(_sealed(recipe, root, prompts, map_bounded)[0])
    with cluster:
        for _ in range(work["repeats"]):
            seconds["ray"].append(_sealed(recipe, root, prompts, _map_on_cluster)[0])
    return {"seconds": seconds, "peak_bytes": _peak_bytes()}


def _sealed(
    recipe: Recipe, root: Store, prompts: LandedPrompts, map_files: Callable
) -> tuple[float, Manifest]:
    revision = teacher_revision(resolve_shipped(recipe.teacher.path))
    shutil.rmtree(root.path("manifests"), ignore_errors=True)  # else it finds the same version
    started = time.monotonic()
    manifest = seal_generation(
        root, fingerprint_of(recipe.pairs, revision), prompts, map_files=map_files
    )
    return time.monotonic() - started, manifest


def reading(work: dict[str, Any]) -> dict[str, Any]:
    """Rows/s of the reader for each batch size, and of scans of its files, in turn."""
    recipe = load_recipe(work["config"], work["overrides"])
    root = open_store(recipe.pairs_root)
    prompts = land(recipe.pairs, root)
    version = _sealed(recipe, root, prompts, map_bounded)[1].version
    manifest = load_manifest(root, version)
    paths = [root.path(file.key) for file in manifest.files]
    _scan(paths, work["limit_s"] / 4, threads=True)  # the files are in memory from here on
    rounds = []
    for number in range(work["repeats"]):
        found = {"scan": _scan(paths, work["limit_s"], threads=True)}
        found["scan_one_thread"] = _scan(paths, work["limit_s"], threads=False)
        found["scan_checked"] = _scan(paths, work["limit_s"], threads=True, checked=True)
        for size in work["batch_sizes"]:
            reader = PairReader(root, manifest, number)
            found[str(size)] = _read_batches(reader, size, work["limit_s"])
        rounds.append(found)
    return {"rounds": rounds, "rows": manifest.rows, "files": len(paths)}


def _read_batches(reader: PairReader, size: int, limit_s: float) -> float:
    """Batch after batch, over as many epochs as `limit_s` allows: as long as a scan goes on."""
    started, rows = time.monotonic(), 0
    for k in itertools.count():
        rows += len(reader.batch(k, size))
        if time.monotonic() - started > limit_s:
            break
    return rows / (time.monotonic() - started)


def _scan(paths: list[str], limit_s: float, *, threads: bool, checked: bool = False) -> float:
    """`checked`: each page's checksum is compared, as the reader does."""
    options = pyarrow.dataset.ParquetFragmentScanOptions(page_checksum_verification=checked)
    parquet = pyarrow.dataset.ParquetFileFormat(default_fragment_scan_options=options)
    started, rows = time.monotonic(), 0
    while rows == 0 or time.monotonic() - started < limit_s:
        files = pyarrow.dataset.dataset(paths, format=parquet)
        for batch in files.to_batches(
            columns=["pair_id", "prompt", "noise", "latent"], use_threads=threads
        ):
            rows += len(batch)
    return rows / (time.monotonic() - started)


def _peak_bytes() -> int:
    """Peak resident memory of this process alone: `getrusage` may answer with the parent's, which
    a new process starts from."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def land(section: PairsSection, root: Store) -> LandedPrompts:
    files = (section.prompts,) if isinstance(section.prompts, str) else section.prompts
    return land_prompts(
        PromptSource(files, section.prompt_column),
        None,
        root,
        seed=section.seed,
        samples_per_prompt=section.samples_per_prompt,
    )
