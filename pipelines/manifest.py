"""Sealed versions of the pair data set: a version exists when its manifest does.

`manifests/NNNNNN.json` is created once and never overwritten. Readers take the list of files from
it and never list a folder. A number may also be void: a version that was given up, or the number
that a writer claimed when it took over another's lease, so that a commit of the old one meets it
and fails. This module needs neither Ray nor torch: "nothing to do" is known at once.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import ValidationError

from pipelines.commits import StoreError, check_create_only, create_once, new_commit_id
from pipelines.lease import Lease
from pipelines.manifest_model import Manifest, ManifestBody
from pipelines.storage import Store

_NAME = re.compile(r"(\d{6})\.json")
_VOID_BYTES = 2048
_ATTEMPTS = 10


class ManifestError(RuntimeError):
    """A manifest that is missing or cannot be trusted."""


class NoSuchVersionError(ManifestError):
    """There is no such version, or not any more."""


# ---------------------------------------------------------------- reading


def manifest_path(root: Store, version: int) -> str:
    return root.path("manifests", f"{version:06d}.json")


def log_numbers(root: Store) -> list[int]:
    """All numbers of the log, void ones too, ascending."""
    return sorted(_log_sizes(root))


def list_versions(root: Store) -> list[int]:
    """The numbers of all sealed versions, oldest first."""
    sizes = _log_sizes(root)
    small = [number for number, size in sizes.items() if size <= _VOID_BYTES]
    with ThreadPoolExecutor(max_workers=8) as pool:  # versions may be large: they are not read
        void = dict(zip(small, pool.map(lambda n: _is_void(root, n), small), strict=True))
    return [number for number in sorted(sizes) if not void.get(number)]


def _log_sizes(root: Store) -> dict[int, int]:
    try:
        entries = root.fs.ls(root.path("manifests"), detail=True)
    except FileNotFoundError:
        return {}
    named = ((_NAME.fullmatch(entry["name"].rsplit("/", 1)[-1]), entry) for entry in entries)
    return {int(match[1]): entry["size"] for match, entry in named if match}


def _is_void(root: Store, number: int) -> bool:
    try:
        content = json.loads(root.fs.cat_file(manifest_path(root, number)))
    except ValueError:
        return False  # a damaged version; to load it says so
    except FileNotFoundError:
        return True  # collected since it was listed
    return isinstance(content, dict) and content.get("void") is True


def load_manifest(root: Store, version: int) -> Manifest:
    """The manifest of `version`; raises `ManifestError` naming the file, `NoSuchVersionError` when
    it was never sealed or is given up."""
    path = manifest_path(root, version)
    try:
        raw: Any = root.fs.cat_file(path)
    except FileNotFoundError as error:
        raise NoSuchVersionError(_no_such(root, path)) from error
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        if _is_void(root, version):
            raise NoSuchVersionError(_no_such(root, path)) from error
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ManifestError(f"{path} is not a valid manifest: {where}: {first['msg']}") from error
    if manifest.version != version:
        raise ManifestError(f"{path} says it is version {manifest.version}")
    manifest.digest = hashlib.sha256(raw).hexdigest()  # an older schema would be written otherwise
    return manifest


def _no_such(root: Store, path: str) -> str:
    known = ", ".join(map(str, list_versions(root))) or "none"
    return f"{path}: no such version; sealed versions: {known}"


def load_versions(root: Store) -> Iterator[Manifest]:
    """All versions, newest first; those that are collected meanwhile are left out."""
    for version in reversed(list_versions(root)):
        with contextlib.suppress(NoSuchVersionError):
            yield load_manifest(root, version)


def latest_manifest(root: Store) -> Manifest | None:
    """The newest sealed version; None: nothing is sealed yet."""
    return next(load_versions(root), None)


def latest_of(root: Store, fingerprint_digest: str) -> Manifest | None:
    """The newest version of one generation."""
    found = (m for m in load_versions(root) if m.fingerprint_digest == fingerprint_digest)
    return next(found, None)


def find_sealed(root: Store, fingerprint_digest: str, prompts_digest: str) -> Manifest | None:
    """The newest version, if it holds exactly these prompts, made exactly so, with none rejected.

    An older one that does is not enough: readers take the newest.
    """
    newest = latest_manifest(root)
    if newest is None or newest.rejected_ids:
        return None
    same = (newest.fingerprint_digest, newest.prompts_digest) == (
        fingerprint_digest,
        prompts_digest,
    )
    return newest if same else None


# ---------------------------------------------------------------- committing


def commit_manifest(root: Store, body: ManifestBody, lease: Lease | None = None) -> Manifest:
    """Seal `body` under the next free number.

    With a `lease`, raises `LeaseLostError` unless it is still the newest one. The order matters:
    the number is chosen first, then the lease is looked at. A lease taken after that look voids
    this very number or a later one, and finds this version in the log or makes it fail.
    """
    for _ in range(_ATTEMPTS):
        numbers = log_numbers(root)
        if not numbers:
            check_create_only(root)
        number = numbers[-1] + 1 if numbers else 1
        if lease is not None:
            lease.check()
        manifest = Manifest(**dict(body), version=number, commit_id=new_commit_id())
        if create_once(root, manifest_path(root, number), manifest.content()):
            return manifest
    raise StoreError(f"could not seal a version in {root.url}: {_ATTEMPTS} numbers were taken")


def void_next_number(root: Store, fence: int, reason: str) -> None:
    """Claim the next number of the log for nobody: no commit prepared before can succeed now."""
    for _ in range(_ATTEMPTS):
        number = (log_numbers(root) or [0])[-1] + 1
        if create_once(root, manifest_path(root, number), void_entry(fence, reason)):
            return
    raise StoreError(f"could not take over {root.url}: {_ATTEMPTS} numbers were taken")


def void_entry(fence: int, reason: str) -> dict[str, Any]:
    """What stands in the log where there is no version."""
    return {"commit_id": new_commit_id(), "void": True, "fence": fence, "reason": reason}
