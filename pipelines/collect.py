"""Collecting what no version needs: old versions, and the files that only they named.

Everything that can go is decided from the manifests that stay. A version names every finished file
of its generation, so a file that none names and that a later writer made is work in progress, and
stays. Order makes a kill harmless: the intent stands before anything goes, a version's manifest
goes before its files, and a ledger entry before the data it vouches for.
"""

import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dmd_core.files import write_atomic
from pipelines.commits import delete_if_there, list_files, read_json
from pipelines.dataset_pins import intent_path, read_pins
from pipelines.lease import Lease
from pipelines.ledger import data_base, fence_of, ledger_base
from pipelines.manifest import (
    list_versions,
    load_manifest,
    load_versions,
    log_numbers,
    manifest_path,
    void_entry,
)
from pipelines.manifest_model import Manifest, generation_folder
from pipelines.storage import Store

_KEPT_NUMBERS = 32  # void entries that stay: nobody is frozen for so many versions
# In a generation's folder: the highest fence of the versions of it that were given up.
_DROPPED = "dropped"
_PARTS = ("ledger", "data", "rejects", "runs")  # deleted in this order
_DELETED_AT_ONCE = 256
_TABLE = re.compile(r"([0-9a-f]{64})(-\d+x\d+)?\.parquet")
_SOURCE = re.compile(r"[0-9a-f]{64}\.json")  # else left by a killed process, or somebody else's


@dataclass(frozen=True)
class Collected:
    """What was deleted."""

    versions: tuple[int, ...]
    files: int


def needs_collecting(root: Store, keep: int) -> bool:
    """Are there more than the `keep` newest and the pinned versions, or did a collector die?"""
    return root.fs.exists(intent_path(root)) or bool(_unpinned(root, list_versions(root)[:-keep]))


def collect_garbage(root: Store, lease: Lease, *, keep: int) -> Collected:
    """Delete all but the `keep` newest and the pinned versions, and every file that only the others
    could name.

    First the intent, then the look at the pins: a reader pins first and looks at the intent then,
    so one of the two sees the other. The lease is looked at before every batch of deletions.
    """
    lease.check()
    old = list_versions(root)[:-keep]
    _write_intent(root, old)
    dropped = _unpinned(root, old)
    _write_intent(root, dropped)  # whoever wants another one need not wait
    for version in dropped:
        _drop(root, lease, version)
    kept = list(load_versions(root))
    files = 0
    if kept:  # else nothing is sealed yet, and everything may be work in progress
        files = _delete(root, lease, _old_void(root, kept))
        for generation in _folders(root, "generations"):
            folder = f"generations/{generation}"
            of_it = [m for m in kept if generation_folder(m.fingerprint_digest) == folder]
            files += _collect_generation(root, lease, folder, of_it)
        files += _collect_prompts(root, lease, {manifest.prompts_digest for manifest in kept})
    lease.check()
    delete_if_there(root, intent_path(root))
    return Collected(tuple(dropped), files)


def _write_intent(root: Store, versions: Sequence[int]) -> None:
    write_atomic(root.fs, intent_path(root), json.dumps({"versions": list(versions)}).encode())


def _unpinned(root: Store, versions: Sequence[int]) -> list[int]:
    pinned = {version for pin in read_pins(root).values() for version in pin.versions}
    return [version for version in versions if version not in pinned]


def _drop(root: Store, lease: Lease, version: int) -> None:
    """Give up a version: its number becomes void, and so can never be taken again by a writer that
    froze before it.

    What remains: a collector that freezes between the next two lines, while a new holder decides
    to keep this very version, drops it when it thaws. Its files stay, and readers hear of it.
    """
    lease.check()
    manifest = load_manifest(root, version)
    folder = generation_folder(manifest.fingerprint_digest)
    fence = max(manifest.fence, _dropped_fence(root, folder) or 0)
    write_atomic(root.fs, root.path(folder, _DROPPED), str(fence).encode())
    entry = void_entry(lease.fence, "collected")
    lease.check()
    write_atomic(root.fs, manifest_path(root, version), json.dumps(entry).encode())


def _old_void(root: Store, kept: Sequence[Manifest]) -> list[str]:
    """Void entries long before the oldest kept version."""
    numbers = log_numbers(root)
    bound = min(min(m.version for m in kept), numbers[-1] - _KEPT_NUMBERS)
    return [manifest_path(root, number) for number in numbers if number < bound]


def _dropped_fence(root: Store, folder: str) -> int | None:
    """The highest fence of the generation's versions that were given up; None: there is none."""
    try:
        content = root.fs.cat_file(root.path(folder, _DROPPED))
    except FileNotFoundError:
        return None
    return int(content or 0)


def _named(manifest: Manifest) -> Iterable[str]:
    """Keys of all files that the version knows: rows that were left out may be asked for again."""
    yield from (file.key for file in manifest.files)
    yield from manifest.excluded_files


def _collect_generation(root: Store, lease: Lease, folder: str, kept: Sequence[Manifest]) -> int:
    """Delete what is left of a generation's old versions; `kept` are those of it that stay.

    Files of a writer later than all its versions are unfinished work, and so is a generation that
    no version was ever made of: they are not touched.
    """
    dropped = _dropped_fence(root, folder)
    if not kept and dropped is None:
        return 0
    sealed = max([*(manifest.fence for manifest in kept), dropped or 0])
    named = {data_base(key.rsplit("/", 1)[-1]) for manifest in kept for key in _named(manifest)}
    deleted = 0
    parts = _PARTS[:2] if kept else _PARTS
    for part in parts:  # one after the other, each with a look at the lease
        base = ledger_base if part == "ledger" else data_base
        unused = [
            name
            for name in list_files(root, root.path(folder, part))
            if base(name) not in named and fence_of(name) <= sealed
        ]
        deleted += _delete(root, lease, _paths(root, folder, part, unused))
    return deleted if kept else deleted + _delete(root, lease, [root.path(folder, _DROPPED)])


def _collect_prompts(root: Store, lease: Lease, digests: set[str]) -> int:
    """Delete landed tables that no version was made from; what points to one goes first."""
    records = []
    for name in filter(_SOURCE.fullmatch, list_files(root, root.path("prompts", "sources"))):
        path = root.path("prompts", "sources", name)
        if (read_json(root, path) or {}).get("digest") not in digests:
            records.append(path)
    tables = [
        root.path("prompts", name)
        for name in list_files(root, root.path("prompts"))
        if (match := _TABLE.fullmatch(name)) and match[1] not in digests
    ]
    return _delete(root, lease, records) + _delete(root, lease, tables)


def _paths(root: Store, folder: str, part: str, names: Iterable[str]) -> list[str]:
    return [root.path(folder, part, name) for name in names]


def _folders(root: Store, folder: str) -> list[str]:
    try:
        entries = root.fs.ls(root.path(folder), detail=True)
    except FileNotFoundError:
        return []
    folders = [entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory"]
    return sorted(name.rsplit("/", 1)[-1] for name in folders)


def _delete(root: Store, lease: Lease, paths: Sequence[str]) -> int:
    with ThreadPoolExecutor(max_workers=8) as pool:
        for start in range(0, len(paths), _DELETED_AT_ONCE):
            lease.check()
            part = paths[start : start + _DELETED_AT_ONCE]
            list(pool.map(lambda path: delete_if_there(root, path), part))
    return len(paths)
