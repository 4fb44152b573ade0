"""Sealed versions of the pair data set: a version exists when its manifest does.

`manifests/NNNNNN.json` is created once and never overwritten. Readers take the list of files from
it and never list a folder. This module needs neither Ray nor torch, so that "nothing to do" is
known at once.
"""

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any, Literal, Self

from fsspec import AbstractFileSystem
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dmd_core.files import is_local, publish_local
from pipelines.storage import Store

SCHEMA_VERSION = 1
_KEY = re.compile(r"[A-Za-z0-9._=/-]+")
_NAME = re.compile(r"(\d{6})\.json")
_MAX_BYTES = 1 << 50
_ATTEMPTS = 10


class ManifestError(RuntimeError):
    """A manifest that is missing or cannot be trusted."""


class StoreError(RuntimeError):
    """A store on which a version cannot be committed safely."""


def canonical_digest(content: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of `content`."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def generation_folder(fingerprint_digest: str) -> str:
    """Where the rows of one fingerprint live, relative to the data set's root."""
    return f"generations/{fingerprint_digest[:16]}"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExcludedRow(_Model):
    """A stored row that is not part of the version. `row` counts from 0 within the file."""

    row: int = Field(ge=0)
    pair_id: int
    reason: Literal["duplicate", "not asked for"]


class ManifestFile(_Model):
    """One Parquet file; `row_groups` holds the rows of each of its row groups."""

    key: str
    bytes: int = Field(gt=0, lt=_MAX_BYTES)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int = Field(gt=0)
    row_groups: tuple[int, ...]
    excluded: tuple[ExcludedRow, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_key(self.key)
        if any(count < 0 for count in self.row_groups) or sum(self.row_groups) != self.rows:
            raise ValueError(f"{self.key}: row groups do not add up to {self.rows} rows")
        rows = [item.row for item in self.excluded]
        if rows != sorted(set(rows)) or (rows and rows[-1] >= self.rows):
            raise ValueError(f"{self.key}: excluded rows are not ascending within {self.rows} rows")
        return self


class ManifestBody(_Model):
    """What a version says, apart from its number.

    `rows` counts the rows that belong to the version. `excluded_files` are files of the generation
    none of whose rows do; they are not in `files`. `rejected_ids` were asked for, but the teacher
    gave nothing usable for them.
    """

    schema_version: int
    created_by: dict[str, str]
    fingerprint: dict[str, Any]
    fingerprint_digest: str
    prompts_digest: str
    files: tuple[ManifestFile, ...]
    excluded_files: tuple[str, ...]
    rejected_ids: tuple[int, ...]
    rows: int = Field(gt=0)
    statistics: dict[str, float]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version is {self.schema_version}; this program reads {SCHEMA_VERSION}"
            )
        if canonical_digest(self.fingerprint) != self.fingerprint_digest:
            raise ValueError("fingerprint_digest is not the digest of fingerprint")
        folder = generation_folder(self.fingerprint_digest) + "/"
        keys = [file.key for file in self.files]
        for key in keys:
            if not key.startswith(folder):
                raise ValueError(f"key {key!r} lies outside {folder}")
        if len(set(keys)) != len(keys):
            raise ValueError("a file is listed twice")
        kept = sum(file.rows - len(file.excluded) for file in self.files)
        if kept != self.rows:
            raise ValueError(f"rows is {self.rows}, but the files hold {kept}")
        return self

    @property
    def rejected(self) -> int:
        return len(self.rejected_ids)

    @property
    def excluded_ids(self) -> tuple[int, ...]:
        return tuple(item.pair_id for file in self.files for item in file.excluded)

    def same_pairs(self, other: "ManifestBody") -> bool:
        """Do both say the same about the same files (whoever made them)?"""
        names = set(ManifestBody.model_fields) - {"created_by"}
        return all(getattr(self, name) == getattr(other, name) for name in names)


class Manifest(ManifestBody):
    """A sealed version. `commit_id` tells its writer from any other."""

    version: int = Field(gt=0, le=999_999)
    commit_id: str = Field(pattern=r"^[0-9a-f]{32}$")

    def to_bytes(self) -> bytes:
        # Unset fields stay out, so that a field added later leaves old digests as they are.
        content = self.model_dump(exclude_unset=True)
        return json.dumps(content, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"

    @property
    def digest(self) -> str:
        """sha256 of the manifest's JSON: what a training run pins."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def check_key(key: str) -> None:
    """Refuse a key that is not a plain path under generations/."""
    plain = _KEY.fullmatch(key) and ".." not in key and "//" not in key
    if not plain or not key.startswith("generations/"):
        raise ValueError(f"key {key!r} is not a plain path under generations/")


# ---------------------------------------------------------------- reading


def manifest_path(root: Store, version: int) -> str:
    return root.path("manifests", f"{version:06d}.json")


def list_versions(root: Store) -> list[int]:
    """The numbers of all sealed versions, oldest first."""
    try:
        entries = root.fs.ls(root.path("manifests"), detail=False)
    except FileNotFoundError:
        return []
    names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def load_manifest(root: Store, version: int) -> Manifest:
    """The manifest of `version`; raises `ManifestError` naming the file."""
    path = manifest_path(root, version)
    try:
        raw = root.fs.cat_file(path)
    except FileNotFoundError as error:
        known = ", ".join(map(str, list_versions(root))) or "none"
        raise ManifestError(f"{path}: no such version; sealed versions: {known}") from error
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ManifestError(f"{path} is not a valid manifest: {where}: {first['msg']}") from error
    if manifest.version != version:
        raise ManifestError(f"{path} says it is version {manifest.version}")
    return manifest


def latest_manifest(root: Store) -> Manifest | None:
    """The newest sealed version; None: nothing is sealed yet."""
    versions = list_versions(root)
    return load_manifest(root, versions[-1]) if versions else None


def find_sealed(root: Store, fingerprint_digest: str, prompts_digest: str) -> Manifest | None:
    """The newest version that holds exactly these prompts, made exactly so, with none rejected."""
    for version in reversed(list_versions(root)):
        manifest = load_manifest(root, version)
        if (
            manifest.fingerprint_digest == fingerprint_digest
            and manifest.prompts_digest == prompts_digest
            and not manifest.rejected_ids
        ):
            return manifest
    return None


# ---------------------------------------------------------------- committing


def commit_manifest(root: Store, body: ManifestBody) -> Manifest:
    """Seal `body` under the next free number.

    A lost reply is not a lost write: after any error the object is read back, and its commit_id
    says whether it is ours (done), another writer's (next number) or absent (again).
    """
    versions = list_versions(root)
    if not versions:
        check_create_only(root)
    number = versions[-1] + 1 if versions else 1
    commit_id = uuid.uuid4().hex
    problem: BaseException | None = None
    for attempt in range(_ATTEMPTS):
        manifest = Manifest(**dict(body), version=number, commit_id=commit_id)
        path = manifest_path(root, number)
        problem = _create(root.fs, path, manifest.to_bytes())
        if problem is None:
            return manifest
        owner = _owner(root.fs, path)
        if owner == commit_id:
            return manifest
        if owner is not None:
            number += 1
        else:
            time.sleep(0.05 * 2 ** min(attempt, 4))
    raise StoreError(
        f"could not seal a version in {root.url} in {_ATTEMPTS} attempts: {problem}"
    ) from problem


def check_create_only(root: Store) -> None:
    """Refuse a store that lets a second writer overwrite: there, versions would be lost."""
    probe = root.path("manifests", f".probe-{uuid.uuid4().hex}")
    first, second = uuid.uuid4().hex.encode(), uuid.uuid4().hex.encode()
    problem = _create(root.fs, probe, first)
    refusal = _create(root.fs, probe, second)
    try:
        found = root.fs.cat_file(probe)
    except FileNotFoundError:
        raise StoreError(f"cannot write to {root.url}: {problem}") from problem
    root.fs.rm_file(probe)
    if refusal is None or found != first:
        raise StoreError(
            f"{root.url} overwrites an object that was to be created only once (If-None-Match is "
            "ignored). Versions could be lost there; expected a store with conditional writes."
        )


def _create(fs: AbstractFileSystem, path: str, data: bytes) -> BaseException | None:
    """Create `path`, or return the error; after one, `path` may or may not hold `data`."""
    try:
        if is_local(fs):
            publish_local(path, data, os.link)  # whole, and only if absent
        else:
            fs.pipe_file(path, data, mode="create")
    except PermissionError as error:
        raise StoreError(f"cannot create {path}: {error}") from error
    except _transport_errors(fs) as error:
        return error
    return None


def _owner(fs: AbstractFileSystem, path: str) -> str | None:
    """The commit_id stored at `path`; "" when it has none; None when nothing is seen there."""
    try:
        content = json.loads(fs.cat_file(path))
    except _transport_errors(fs):
        return None
    except ValueError:
        return ""
    return str(content.get("commit_id", "")) if isinstance(content, dict) else ""


def _transport_errors(fs: AbstractFileSystem) -> tuple[type[Exception], ...]:
    if is_local(fs):
        return (OSError,)
    from botocore.exceptions import BotoCoreError

    # s3fs turns replies into OSError; a connection that breaks surfaces as botocore's own error.
    return (OSError, BotoCoreError)
