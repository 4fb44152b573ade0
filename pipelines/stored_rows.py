"""Single rows, columns and files of a sealed version, for those who look into it.

Training reads through `pipelines.batches`; here rows are asked for by place or for one column.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import torch

from pipelines.bounded import map_bounded
from pipelines.landed import landed_ids_of
from pipelines.manifest_model import Manifest, ManifestFile
from pipelines.pair_files import PairFileError, kept_mask
from pipelines.pairs import (
    PairSchemaError,
    decode_negative_prompts,
    decode_pairs,
    fingerprint_digest,
)
from pipelines.parquet_parts import open_parts
from pipelines.seal import FileFacts, Inspector, SealError
from pipelines.storage import Store

_HASHED_AT_ONCE = 1 << 20
_NAMED_IDS = 5


@dataclass(frozen=True)
class StoredRow:
    """One pair as it is stored: `noise` and `latent` are (C,h,w) in the stored dtype.

    `negative_prompt` None: the fingerprint's. `key`: the file it lies in.
    """

    pair_id: int
    prompt: str
    seed: int
    negative_prompt: str | None
    noise: torch.Tensor
    latent: torch.Tensor
    key: str


@dataclass(frozen=True)
class FilesReport:
    """All files of a version, read whole. `problems`: what is not as the manifest says."""

    version: int
    files: int
    bytes: int
    rows: int
    problems: tuple[str, ...]


def kept_places(file: ManifestFile) -> np.ndarray:
    """Places in the file, ascending, of the rows that belong to the version."""
    return np.flatnonzero(kept_mask(file))


def read_columns(root: Store, file: ManifestFile, columns: Sequence[str]) -> pa.Table:
    """Some columns of the file's rows that belong to the version; raises `PairFileError`."""
    path = root.path(file.key)
    try:
        with open_parts(root, path, checksums=True) as parquet:
            table = parquet.read(columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise PairFileError(f"{path}: cannot be read: {error}") from error
    if table.num_rows != file.rows or table.column_names != list(columns):
        raise PairFileError(
            f"{path}: {table.num_rows} rows with {', '.join(table.column_names) or 'no columns'}; "
            f"expected {file.rows} rows with {', '.join(columns)}"
        )
    return table.take(kept_places(file)) if file.excluded else table


def version_ids(root: Store, manifest: Manifest) -> np.ndarray:
    """The ids of all rows of the version, int64, in the order of its files."""

    def ids(file: ManifestFile) -> np.ndarray:
        return read_columns(root, file, ["pair_id"])["pair_id"].to_numpy()

    return np.concatenate(list(map_bounded(ids, manifest.files)))


def random_rows(manifest: Manifest, count: int, seed: int) -> np.ndarray:
    """Places (indices into the version, ascending) of at most `count` random rows."""
    rng = np.random.default_rng(seed)
    count = min(count, manifest.rows)
    return np.sort(rng.choice(manifest.rows, count, replace=False, shuffle=False))


def read_rows(
    root: Store, manifest: Manifest, rows: np.ndarray, *, verify: bool = False
) -> list[StoredRow]:
    """The rows at the given ascending places of the version; reads only their row groups.

    Raises `PairFileError` for a file that is not what the manifest says; with `verify` its size
    and sha256 are compared too.
    """
    places = [kept_places(file) for file in manifest.files]
    starts = np.cumsum([0, *map(len, places)])
    owner = np.searchsorted(starts, rows, side="right") - 1
    wanted = [
        (manifest.files[index], places[index][rows[owner == index] - starts[index]])
        for index in np.unique(owner)
    ]

    def read(item: tuple[ManifestFile, np.ndarray]) -> list[StoredRow]:
        return _read_places(root, manifest, *item, verify=verify)

    return [row for part in map_bounded(read, wanted) for row in part]


def _read_places(
    root: Store, manifest: Manifest, file: ManifestFile, places: np.ndarray, *, verify: bool
) -> list[StoredRow]:
    path = root.path(file.key)
    found: list[StoredRow] = []
    try:
        if verify:
            _check_content(root, path, file)
        with open_parts(root, path, checksums=True) as parquet:
            digest = fingerprint_digest(parquet.schema_arrow)
            counts = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            if tuple(counts) != file.row_groups or digest != manifest.fingerprint_digest:
                raise PairFileError(
                    f"{path}: row groups {counts} of {digest[:16]}, but the manifest says "
                    f"{list(file.row_groups)} of {manifest.fingerprint_digest[:16]}"
                )
            ends = np.cumsum(file.row_groups)
            groups = np.searchsorted(ends, places, side="right")
            for group in np.unique(groups):
                start = ends[group] - file.row_groups[group]
                table = parquet.read_row_group(int(group)).take(places[groups == group] - start)
                found += _stored(table, file.key)
    except (pa.ArrowException, PairSchemaError, OSError) as error:
        raise PairFileError(f"{path}: cannot be read: {error}") from error
    return found


def _stored(table: pa.Table, key: str) -> list[StoredRow]:
    batch, seeds = decode_pairs(table), table["seed"].to_pylist()
    negatives = decode_negative_prompts(table)
    return [
        StoredRow(
            pair_id=batch.pair_ids[row],
            prompt=batch.prompts[row],
            seed=seeds[row],
            negative_prompt=negatives[row],
            noise=batch.noise[row],
            latent=batch.latents[row],
            key=key,
        )
        for row in range(len(batch))
    ]


def _check_content(root: Store, path: str, file: ManifestFile) -> None:
    digest, size = hashlib.sha256(), 0
    with root.fs.open(path, "rb") as stream:
        while block := cast(bytes, stream.read(_HASHED_AT_ONCE)):
            digest.update(block)
            size += len(block)
    if problem := _difference(path, file, size, digest.hexdigest()):
        raise PairFileError(problem)


def _difference(path: str, file: ManifestFile, size: int, sha256: str) -> str:
    if size != file.bytes:
        return f"{path}: {size} bytes, but the manifest says {file.bytes}"
    if sha256 != file.sha256:
        return f"{path}: sha256 {sha256[:16]}…, but the manifest says {file.sha256[:16]}…"
    return ""


# ---------------------------------------------------------------- every file, whole


def check_files(root: Store, manifest: Manifest) -> FilesReport:
    """Read every file of the version and compare size, sha256, footer, rows and ids."""
    inspector = Inspector(root, manifest.fingerprint_digest)

    def check(file: ManifestFile) -> tuple[np.ndarray, list[str]]:
        path = root.path(file.key)
        try:
            facts = inspector(file.key)
        except FileNotFoundError:
            return np.empty(0, np.int64), [f"{path}: missing"]
        except (OSError, SealError) as error:
            return np.empty(0, np.int64), [str(error)]
        problems = list(_facts_problems(path, file, facts))
        places = kept_places(file)
        return facts.pair_ids[places[places < len(facts.pair_ids)]], problems

    parts, problems = [], []
    for ids, found in map_bounded(check, manifest.files):
        parts.append(ids)
        problems += found
    ids = np.concatenate(parts)
    if not problems:  # else ids are missing for a reason that was named
        problems += _id_problems(root, manifest, ids)
    return FilesReport(
        version=manifest.version,
        files=len(manifest.files),
        bytes=sum(file.bytes for file in manifest.files),
        rows=len(ids),
        problems=tuple(problems),
    )


def _id_problems(root: Store, manifest: Manifest, ids: np.ndarray) -> Iterator[str]:
    distinct, counts = np.unique(ids, return_counts=True)
    rejected = np.array(manifest.rejected_ids, dtype=np.int64)
    asked = landed_ids_of(root, manifest)
    found = {
        "belong to the version more than once": distinct[counts > 1],
        "are stored and listed as rejected": np.intersect1d(distinct, rejected),
    }
    if asked is not None:
        found["are stored and were not asked for"] = np.setdiff1d(distinct, asked)
        holes = np.setdiff1d(asked, np.concatenate([distinct, rejected]))
        found["were asked for, and are neither stored nor rejected"] = holes
    for what, which in found.items():
        if len(which):
            some = ", ".join(map(str, which[:_NAMED_IDS].tolist()))
            yield f"version {manifest.version}: {len(which)} ids {what}: {some}"


def _facts_problems(path: str, file: ManifestFile, facts: FileFacts) -> Iterator[str]:
    if problem := _difference(path, file, facts.bytes, facts.sha256):
        yield problem
    if facts.row_groups != file.row_groups:
        yield (
            f"{path}: row groups of {list(facts.row_groups)} rows, "
            f"but the manifest says {list(file.row_groups)}"
        )
        return
    for row, pair_id in zip(file.excluded.rows, file.excluded.pair_ids, strict=True):
        if (found := int(facts.pair_ids[row])) != pair_id:
            yield f"{path}: row {row} is {found}, but the manifest excludes {pair_id}"
