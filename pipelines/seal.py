"""Sealing: the files of one generation → a version of the data set.

Each data file is inspected once, on its own and anywhere; what is put together here is ids and
figures. A row may be stored twice (a writer that was thought dead went on): the first file in name
order wins. Rows that nobody asks for any more stay where they are and are left out of the version.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.manifest import (
    SCHEMA_VERSION,
    ExcludedRow,
    Manifest,
    ManifestBody,
    ManifestFile,
    commit_manifest,
    latest_manifest,
)
from pipelines.pairs import (
    Fingerprint,
    PairSchemaError,
    decode_pairs,
    fingerprint_digest,
    library_versions,
)
from pipelines.prompts import LandedPrompts
from pipelines.storage import Store


class SealError(RuntimeError):
    """The generation's files do not make a whole version."""


@dataclass(frozen=True)
class FileFacts:
    """One inspected file. `moments` (rows, 4) float64: sum, sum of squares, min, max of latents."""

    key: str
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]
    pair_ids: np.ndarray
    elements: int
    moments: np.ndarray


# (what to do with one key, keys) → results in the order of the keys
MapFiles = Callable[[Callable[[str], FileFacts], Sequence[str]], Iterable[FileFacts]]


def map_in_threads(inspect: Callable[[str], FileFacts], keys: Sequence[str]) -> Iterable[FileFacts]:
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(inspect, keys))


def seal_generation(
    root: Store,
    fingerprint: Fingerprint,
    prompts: LandedPrompts,
    *,
    map_files: MapFiles = map_in_threads,
) -> Manifest:
    """Check the generation's files against the landed prompts and commit a version.

    Raises `SealError` for a damaged or foreign file, and when rows are missing that were not
    rejected. A version that would say what the newest one says already is not written again.
    """
    keys = data_keys(root, fingerprint)
    facts = list(map_files(Inspector(root, fingerprint.digest), keys))
    asked = landed_ids(root, prompts)
    files, unused, kept = _choose_rows(facts, asked)
    stored = np.concatenate([ids for ids, _ in kept]) if kept else np.empty(0, np.int64)
    missing = np.setdiff1d(asked, stored)
    rejected = np.intersect1d(missing, rejected_ids(root, fingerprint))
    if len(rejected) < len(missing):
        raise SealError(
            f"{root.path(fingerprint.folder)}: {len(missing) - len(rejected)} of {len(asked)} "
            "rows are neither stored nor rejected; run the generation again"
        )
    if not len(stored):
        raise SealError(
            f"{root.path(fingerprint.folder)}: the teacher gave no usable pair; the reasons are "
            f"in {root.path(fingerprint.folder, 'rejects')}"
        )
    body = ManifestBody(
        schema_version=SCHEMA_VERSION,
        created_by=library_versions(),
        fingerprint=fingerprint.as_dict(),
        fingerprint_digest=fingerprint.digest,
        prompts_digest=prompts.digest,
        files=tuple(files),
        excluded_files=tuple(unused),
        rejected_ids=tuple(rejected.tolist()),
        rows=len(stored),
        statistics=_statistics(np.concatenate([part for _, part in kept]), facts[0].elements),
    )
    newest = latest_manifest(root)
    if newest is not None and newest.same_pairs(body):
        return newest
    return commit_manifest(root, body)


def data_keys(root: Store, fingerprint: Fingerprint) -> list[str]:
    """The generation's data files in name order, as keys relative to the data set's root."""
    return [f"{fingerprint.folder}/data/{name}" for name in list_names(root, fingerprint, "data")]


def list_names(root: Store, fingerprint: Fingerprint, part: str) -> list[str]:
    """Names of the files in one folder of the generation (data, ledger or rejects), sorted."""
    try:
        entries = root.fs.ls(root.path(fingerprint.folder, part), detail=True)
    except FileNotFoundError:
        return []
    return sorted(entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file")


def landed_ids(root: Store, prompts: LandedPrompts) -> np.ndarray:
    """The ids that are asked for, ascending, int64."""
    table = pq.read_table(io.BytesIO(_read(root, prompts.path)), columns=["pair_id"])
    return np.sort(table["pair_id"].to_numpy())


def rejected_ids(root: Store, fingerprint: Fingerprint) -> np.ndarray:
    """All ids that any run of this generation ever rejected, int64."""
    found: list[int] = []
    for name in list_names(root, fingerprint, "rejects"):
        path = root.path(fingerprint.folder, "rejects", name)
        try:
            lines = _read(root, path).decode().splitlines()
            found += [int(json.loads(line)["pair_id"]) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise SealError(f"{path} is not a list of rejected rows: {error}") from error
    return np.array(found, dtype=np.int64)


def _read(root: Store, path: str) -> bytes:
    return cast(bytes, root.fs.cat_file(path))


@dataclass(frozen=True)
class Inspector:
    """Reads one data file whole and checks it; runs wherever the bytes should be read."""

    root: Store
    fingerprint_digest: str

    def __call__(self, key: str) -> FileFacts:
        path = self.root.path(key)
        raw = _read(self.root, path)
        try:
            file = pq.ParquetFile(io.BytesIO(raw))
            table = file.read()
            batch = decode_pairs(table)
        except (pa.ArrowException, OSError, PairSchemaError) as error:
            raise SealError(
                f"{path} cannot be read; move it away and run again, and its rows will be made "
                f"anew: {error}"
            ) from error
        if fingerprint_digest(table.schema) != self.fingerprint_digest:
            raise SealError(
                f"{path} was made by {fingerprint_digest(table.schema)[:16]}, "
                f"but lies in generation {self.fingerprint_digest[:16]}"
            )
        latents = batch.latents.double().flatten(1)
        if not bool(latents.isfinite().all()):
            raise SealError(f"{path} holds latents that are not finite")
        moments = [latents.sum(1), latents.square().sum(1), latents.amin(1), latents.amax(1)]
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        return FileFacts(
            key=key,
            bytes=len(raw),
            sha256=hashlib.sha256(raw).hexdigest(),
            row_groups=tuple(counts),
            pair_ids=np.array(batch.pair_ids, dtype=np.int64),
            elements=latents.shape[1],
            moments=np.stack([moment.numpy() for moment in moments], axis=1),
        )


def _choose_rows(
    facts: Sequence[FileFacts], asked: np.ndarray
) -> tuple[list[ManifestFile], list[str], list[tuple[np.ndarray, np.ndarray]]]:
    """Files of the version, files without a row in it, and (ids, moments) of the rows in it."""
    files, unused, kept = [], [], []
    if not facts:
        return files, unused, kept
    ids = np.concatenate([fact.pair_ids for fact in facts])
    first = np.zeros(len(ids), dtype=bool)
    first[np.unique(ids, return_index=True)[1]] = True
    wanted = np.isin(ids, asked)
    start = 0
    for fact in facts:
        span = slice(start, start + len(fact.pair_ids))
        start = span.stop
        keep = first[span] & wanted[span]
        if not keep.any():
            unused.append(fact.key)
            continue
        excluded = tuple(
            ExcludedRow(
                row=int(row),
                pair_id=int(fact.pair_ids[row]),
                reason="duplicate" if wanted[span][row] else "not asked for",
            )
            for row in np.flatnonzero(~keep)
        )
        files.append(
            ManifestFile(
                key=fact.key,
                bytes=fact.bytes,
                sha256=fact.sha256,
                rows=len(fact.pair_ids),
                row_groups=fact.row_groups,
                excluded=excluded,
            )
        )
        kept.append((fact.pair_ids[keep], fact.moments[keep]))
    return files, unused, kept


def _statistics(moments: np.ndarray, elements: int) -> dict[str, float]:
    """Of all latents of the version's rows."""
    count = len(moments) * elements
    mean = moments[:, 0].sum() / count
    variance = max(0.0, moments[:, 1].sum() / count - mean**2)
    return {
        "latent_mean": float(mean),
        "latent_std": float(variance**0.5),
        "latent_min": float(moments[:, 2].min()),
        "latent_max": float(moments[:, 3].max()),
    }
