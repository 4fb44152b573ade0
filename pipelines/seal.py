"""Sealing: the files of one generation → a version of the data set.

Only files whose writing was finished count: those with an entry in the ledger, and those that an
earlier version names. Each is inspected once, on its own and anywhere; what is put together here is
ids and figures. A row may be stored twice (a writer that was thought dead went on): the file that
an earlier version names wins, else the first in name order, which starts with the writer's fence.
Rows that nobody asks for any more stay where they are and are left out of the version.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.bounded import map_bounded
from pipelines.commits import list_files
from pipelines.landed import landed_ids
from pipelines.lease import Lease
from pipelines.ledger import data_base
from pipelines.manifest import commit_manifest, latest_manifest, latest_of
from pipelines.manifest_model import (
    SCHEMA_VERSION,
    ExcludedRows,
    Manifest,
    ManifestBody,
    ManifestFile,
)
from pipelines.pairs import (
    Fingerprint,
    PairSchemaError,
    fingerprint_digest,
    library_versions,
    pair_facts,
)
from pipelines.prompts import LandedPrompts
from pipelines.rejects import read_rejects
from pipelines.storage import Store


class SealError(RuntimeError):
    """The generation's files do not make a whole version."""


class MissingRowsError(SealError):
    """Rows (`ids`) are neither stored nor rejected: the generation is not finished."""

    def __init__(self, message: str, ids: np.ndarray) -> None:
        super().__init__(message)
        self.ids = ids


class NoUsablePairError(SealError):
    """All rows of the generation were `rejected` (their number): there is nothing to seal."""

    def __init__(self, message: str, rejected: int) -> None:
        super().__init__(message)
        self.rejected = rejected


@dataclass(frozen=True)
class FileFacts:
    """One inspected file. `moments` (rows, 5) float64: number, sum, sum of squares, min and max of
    each row's latent values."""

    key: str
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]
    pair_ids: np.ndarray
    moments: np.ndarray


# (what to do with one key, keys) → results in the order of the keys
MapFiles = Callable[[Callable[[str], FileFacts], Sequence[str]], Iterable[FileFacts]]


def inspect_all(inspect: Callable[[str], FileFacts], keys: Sequence[str]) -> list[FileFacts]:
    """A task's share of the files, one after the other."""
    return [inspect(key) for key in keys]


def seal_generation(
    root: Store,
    fingerprint: Fingerprint,
    prompts: LandedPrompts,
    *,
    lease: Lease | None = None,
    map_files: MapFiles = map_bounded,
) -> Manifest:
    """Check the generation's files against the landed prompts and commit a version.

    Raises `SealError` for a damaged or foreign file, and when rows are missing that were not
    rejected (under this `lease`, where there is one); `NoUsablePairError` when all were. A version
    that would say what the newest one says already is not written again.
    """
    earlier = latest_of(root, fingerprint.digest)
    keys = data_keys(root, fingerprint, earlier)
    facts = list(map_files(Inspector(root, fingerprint.digest), keys))
    if earlier is not None:
        _refuse_changed_files(root, earlier, facts)
    asked = landed_ids(root, prompts)
    files, unused, kept = _choose_rows(facts, asked)
    stored = np.concatenate([ids for ids, _ in kept]) if kept else np.empty(0, np.int64)
    rejected = _rejected_of(root, fingerprint, lease, asked, stored)
    if not len(stored):
        folder = fingerprint.folder
        reason = Counter(read_rejects(root, folder).values()).most_common(1)[0][0]
        raise NoUsablePairError(
            f"{root.path(folder)}: the teacher gave no usable pair, most often because of {reason} "
            f"(all reasons are in {root.path(folder, 'rejects')}); the same command tries again",
            rejected=len(rejected),
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
        statistics=_statistics(np.concatenate([moments for _, moments in kept])),
        fence=lease.fence if lease else 0,
    )
    newest = latest_manifest(root)
    if newest is not None and newest.same_pairs(body):
        return newest
    return commit_manifest(root, body, lease)


def _refuse_changed_files(root: Store, earlier: Manifest, facts: Sequence[FileFacts]) -> None:
    """A file that a version names is never written again: another content is damage."""
    sealed = {file.key: file.sha256 for file in earlier.files}
    for fact in facts:
        if sealed.get(fact.key, fact.sha256) != fact.sha256:
            raise SealError(
                f"{root.path(fact.key)} is not what version {earlier.version} was sealed with; "
                "move it away and run again, and its rows will be made anew"
            )


def _rejected_of(
    root: Store,
    fingerprint: Fingerprint,
    lease: Lease | None,
    asked: np.ndarray,
    stored: np.ndarray,
) -> np.ndarray:
    """The missing ids, all of which were rejected; raises `MissingRowsError` if one was not."""
    missing = np.setdiff1d(asked, stored)
    rejects = read_rejects(root, fingerprint.folder, fence=lease.fence if lease else None)
    rejected = np.intersect1d(missing, np.fromiter(rejects, np.int64, len(rejects)))
    if len(unknown := np.setdiff1d(missing, rejected)):
        raise MissingRowsError(
            f"{root.path(fingerprint.folder)}: {len(unknown)} of {len(asked)} "
            "rows are neither stored nor rejected; run the generation again",
            unknown,
        )
    return rejected


def data_keys(root: Store, fingerprint: Fingerprint, earlier: Manifest | None = None) -> list[str]:
    """The generation's finished data files, as keys relative to the data set's root: first those
    that the `earlier` version names, then the others in name order."""
    folder = f"{fingerprint.folder}/data"
    present = [n for n in list_names(root, fingerprint, "data") if n.endswith(".parquet")]
    ledger = set(list_names(root, fingerprint, "ledger"))
    finished = [name for name in present if f"{data_base(name)}.parquet" in ledger]
    known = [file.key for file in earlier.files] if earlier else []
    there = {f"{folder}/{name}" for name in present}
    first = [key for key in known if key in there]
    seen = set(first)
    return first + [key for name in finished if (key := f"{folder}/{name}") not in seen]


def list_names(root: Store, fingerprint: Fingerprint, part: str) -> list[str]:
    """Names of the files in one folder of the generation (data, ledger or rejects), sorted."""
    return list_files(root, root.path(fingerprint.folder, part))


@dataclass(frozen=True)
class Inspector:
    """Reads one data file whole and checks it; runs wherever the bytes should be read."""

    root: Store
    fingerprint_digest: str

    def __call__(self, key: str) -> FileFacts:
        path = self.root.path(key)
        raw = cast(bytes, self.root.fs.cat_file(path))
        try:
            file = pq.ParquetFile(io.BytesIO(raw), page_checksum_verification=True)
            table = file.read()
            pair_ids, _, latents = pair_facts(table)
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
        if not np.isfinite(latents).all():
            raise SealError(f"{path} holds latents that are not finite")
        counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        return FileFacts(
            key=key,
            bytes=len(raw),
            sha256=hashlib.sha256(raw).hexdigest(),
            row_groups=tuple(counts),
            pair_ids=pair_ids,
            moments=_moments(latents),
        )


def _moments(latents: np.ndarray) -> np.ndarray:
    """(rows, 5) float64 of latents (rows, values); see `FileFacts`."""
    values = latents.astype(np.float64)
    return np.stack(
        [
            np.full(len(values), values.shape[1], dtype=np.float64),
            values.sum(1),
            np.square(values).sum(1),
            values.min(1),
            values.max(1),
        ],
        axis=1,
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
        excluded = ExcludedRows()
        if not keep.all():
            excluded = ExcludedRows(
                rows=tuple(np.flatnonzero(~keep).tolist()),
                pair_ids=tuple(fact.pair_ids[~keep].tolist()),
                duplicates=tuple(np.flatnonzero(~keep & wanted[span]).tolist()),
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


def _statistics(moments: np.ndarray) -> dict[str, float]:
    """Of all latents of the version's rows; `moments` as in `FileFacts`."""
    count = moments[:, 0].sum()
    mean = moments[:, 1].sum() / count
    variance = max(0.0, moments[:, 2].sum() / count - mean**2)
    return {
        "latent_mean": float(mean),
        "latent_std": float(variance**0.5),
        "latent_min": float(moments[:, 3].min()),
        "latent_max": float(moments[:, 4].max()),
    }
