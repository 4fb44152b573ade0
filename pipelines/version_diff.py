"""What changed from one sealed version of a data set to another."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.bounded import map_bounded
from pipelines.manifest_model import Manifest, ManifestFile
from pipelines.storage import Store
from pipelines.stored_rows import kept_places, read_columns, version_ids

_EXAMPLES = 5
_HASH_BYTES = 8
# Everything of a row but its id; the schema's version is no part of the pair.
_PARTS = ("prompt", "seed", "negative_prompt", "noise", "latent")


@dataclass(frozen=True)
class VersionDiff:
    """Rows of `new` against rows of `old`, by id.

    `kept` = `same_file` (the same row of the same file, not read again) + `compared`; of the
    compared ones `equal` are equal bit for bit, and `differing` counts the parts that are not.
    `fingerprint`: changed field → (old value, new value). Prompts count once, however many rows
    they have.
    """

    old: int
    new: int
    added: int
    removed: int
    kept: int
    same_file: int
    compared: int
    equal: int
    differing: dict[str, int]
    fingerprint: dict[str, tuple[Any, Any]]
    prompts_added: int
    prompts_removed: int
    added_examples: tuple[str, ...]
    removed_examples: tuple[str, ...]


@dataclass(frozen=True)
class _Index:
    """The version's rows in order of id: where each lies. `file` indexes the version's files."""

    manifest: Manifest
    ids: np.ndarray
    file: np.ndarray
    place: np.ndarray

    def locations(self, rows: np.ndarray, names: dict[tuple[str, str], int]) -> np.ndarray:
        """(rows, 2): the number in `names` of the file's (key, sha256), and the place in it."""
        numbers = [names[file.key, file.sha256] for file in self.manifest.files]
        return np.stack([np.array(numbers)[self.file[rows]], self.place[rows]], axis=1)


def diff_versions(root: Store, old: Manifest, new: Manifest) -> VersionDiff:
    """Reads the ids of both, the prompts where ids differ, and rows that moved to another file."""
    before, after = _index(root, old), _index(root, new)
    kept, in_old, in_new = np.intersect1d(
        before.ids, after.ids, assume_unique=True, return_indices=True
    )
    both = [(file.key, file.sha256) for file in (*old.files, *new.files)]
    names = {name: number for number, name in enumerate(dict.fromkeys(both))}
    moved = (before.locations(in_old, names) != after.locations(in_new, names)).any(axis=1)
    equal = _compare(root, before, in_old[moved], after, in_new[moved])
    added, removed = len(after.ids) - len(kept), len(before.ids) - len(kept)
    prompts = _prompt_changes(root, old, new) if added or removed else ((0, ()), (0, ()))
    (prompts_added, added_examples), (prompts_removed, removed_examples) = prompts
    return VersionDiff(
        old=old.version,
        new=new.version,
        added=added,
        removed=removed,
        kept=len(kept),
        same_file=int((~moved).sum()),
        compared=int(moved.sum()),
        equal=int(equal.all(axis=1).sum()),
        differing={
            name: int((~equal[:, column]).sum())
            for column, name in enumerate(_PARTS)
            if not equal[:, column].all()
        },
        fingerprint=changed_fields(old.fingerprint, new.fingerprint),
        prompts_added=prompts_added,
        prompts_removed=prompts_removed,
        added_examples=added_examples,
        removed_examples=removed_examples,
    )


def changed_fields(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """field → (old, new) of every field that differs; None where a side lacks it."""
    names = [*old, *(name for name in new if name not in old)]
    return {
        name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)
    }


# ---------------------------------------------------------------- rows


def _index(root: Store, manifest: Manifest) -> _Index:
    places = [kept_places(file) for file in manifest.files]
    found = version_ids(root, manifest)
    order = np.argsort(found, kind="stable")
    owner = np.repeat(np.arange(len(places)), [len(part) for part in places])
    return _Index(manifest, found[order], owner[order], np.concatenate(places)[order])


def _compare(
    root: Store, before: _Index, in_old: np.ndarray, after: _Index, in_new: np.ndarray
) -> np.ndarray:
    """(rows, parts) bool: which parts of the rows are equal. Row i of both is the same id.

    Rows of one file lie in any files of the other version, so their hashes are compared: a few
    bytes for each row instead of the rows themselves.
    """
    return _hashes(root, before, in_old) == _hashes(root, after, in_new)


def _hashes(root: Store, index: _Index, rows: np.ndarray) -> np.ndarray:
    """(rows, parts) uint64."""
    found = np.zeros((len(rows), len(_PARTS)), dtype=np.uint64)
    owner = index.file[rows]

    def hashes(number: int) -> tuple[np.ndarray, np.ndarray]:
        here = np.flatnonzero(owner == number)
        file = index.manifest.files[number]
        table = read_columns(root, file, _PARTS)
        taken = table.take(np.searchsorted(kept_places(file), index.place[rows[here]]))
        return here, np.stack([_hash_column(taken[name]) for name in _PARTS], axis=1)

    for here, values in map_bounded(hashes, np.unique(owner).tolist()):
        found[here] = values
    return found


def _hash_column(column: pa.ChunkedArray) -> np.ndarray:
    values = column.to_pylist()
    raw = (value if isinstance(value, bytes) else repr(value).encode() for value in values)
    return np.fromiter(map(_hash, raw), dtype=np.uint64, count=len(column))


def _hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=_HASH_BYTES).digest(), "little")


# ---------------------------------------------------------------- prompts


def _prompt_changes(
    root: Store, old: Manifest, new: Manifest
) -> tuple[tuple[int, tuple[str, ...]], tuple[int, tuple[str, ...]]]:
    """((prompts added, some of them), (prompts removed, some of them))."""
    before, after = _prompt_hashes(root, old), _prompt_hashes(root, new)
    added, removed = np.setdiff1d(after, before), np.setdiff1d(before, after)
    return (
        (len(added), _examples(root, new, set(added.tolist()))),
        (len(removed), _examples(root, old, set(removed.tolist()))),
    )


def _prompt_hashes(root: Store, manifest: Manifest) -> np.ndarray:
    """Hashes of the distinct prompts: millions of prompts are not held as text."""
    parts = [
        np.array([_hash(prompt.encode()) for prompt in prompts], dtype=np.uint64)
        for prompts in _distinct_prompts(root, manifest)
    ]
    return np.unique(np.concatenate(parts))


def _examples(root: Store, manifest: Manifest, wanted: set[int]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    if not wanted:
        return ()
    for prompts in _distinct_prompts(root, manifest):
        found |= {prompt: None for prompt in prompts if _hash(prompt.encode()) in wanted}
        if len(found) >= _EXAMPLES:
            break
    return tuple(found)[:_EXAMPLES]


def _distinct_prompts(root: Store, manifest: Manifest) -> Iterator[list[str]]:
    """For each file of the version: its distinct prompts."""

    def distinct(file: ManifestFile) -> list[str]:
        return read_columns(root, file, ["prompt"])["prompt"].unique().to_pylist()

    return map_bounded(distinct, manifest.files)
