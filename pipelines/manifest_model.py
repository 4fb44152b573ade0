"""What the manifest of a sealed version says: files, rows left out, what made them, statistics."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SCHEMA_VERSION = 3
_READABLE = (2, SCHEMA_VERSION)
_KEY = re.compile(r"[A-Za-z0-9._=/-]+")
_MAX_BYTES = 1 << 50


def canonical_digest(content: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of `content`."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def generation_folder(fingerprint_digest: str) -> str:
    """Where the rows of one fingerprint live, relative to the data set's root."""
    return f"generations/{fingerprint_digest[:16]}"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExcludedRows(_Model):
    """Stored rows of a file that are not part of the version, in columns: there may be millions.

    `rows` count from 0 within the file and ascend; row i is the pair pair_ids[i]. Of a row in
    `duplicates` another copy is part of the version; the others were not asked for.
    """

    rows: tuple[int, ...] = ()
    pair_ids: tuple[int, ...] = ()
    duplicates: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def problem(self, rows: int) -> str | None:
        """What cannot be true of a file of so many rows."""
        if len(self.rows) != len(self.pair_ids):
            return f"{len(self.rows)} excluded rows have {len(self.pair_ids)} ids"
        if not _ascending_below(self.rows, rows):
            return f"excluded rows are not ascending within {rows} rows"
        if not _ascending_below(self.duplicates, rows) or not set(self.duplicates) <= set(
            self.rows
        ):
            return "duplicates are not some of the excluded rows, ascending"
        return None


class _ListedRow(_Model):
    row: int
    pair_id: int
    reason: Literal["duplicate", "not asked for"]


def _ascending_below(rows: Sequence[int], end: int) -> bool:
    return not rows or (
        0 <= rows[0] and rows[-1] < end and all(a < b for a, b in itertools.pairwise(rows))
    )


class ManifestFile(_Model):
    """One Parquet file; `row_groups` holds the rows of each of its row groups."""

    key: str
    bytes: int = Field(gt=0, lt=_MAX_BYTES)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int = Field(gt=0)
    row_groups: tuple[int, ...]
    excluded: ExcludedRows = ExcludedRows()

    @field_validator("excluded", mode="before")
    @classmethod
    def _columns(cls, found: Any) -> Any:
        """Manifests of schema 2 list the rows one by one, each with its reason."""
        if not isinstance(found, list):
            return found
        listed = [_ListedRow.model_validate(item) for item in found]
        return {
            "rows": [item.row for item in listed],
            "pair_ids": [item.pair_id for item in listed],
            "duplicates": [item.row for item in listed if item.reason == "duplicate"],
        }

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_key(self.key)
        if any(count < 0 for count in self.row_groups) or sum(self.row_groups) != self.rows:
            raise ValueError(f"{self.key}: row groups do not add up to {self.rows} rows")
        if problem := self.excluded.problem(self.rows):
            raise ValueError(f"{self.key}: {problem}")
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
    fence: int = Field(default=0, ge=0, description="of the lease under which it was sealed")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.schema_version not in _READABLE:
            raise ValueError(
                f"schema_version is {self.schema_version}; "
                f"this program reads {' and '.join(map(str, _READABLE))}"
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
        return tuple(pair_id for file in self.files for pair_id in file.excluded.pair_ids)

    def same_pairs(self, other: "ManifestBody") -> bool:
        """Do both say the same about the same files (whoever made them)?"""
        names = set(ManifestBody.model_fields) - {"created_by", "fence", "schema_version"}
        return all(getattr(self, name) == getattr(other, name) for name in names)


class Manifest(ManifestBody):
    """A sealed version. `commit_id` tells its writer from any other."""

    version: int = Field(gt=0, le=999_999)
    commit_id: str = Field(pattern=r"^[0-9a-f]{32}$")

    def content(self) -> dict[str, Any]:
        # Unset fields stay out, so that a field added later leaves old digests as they are.
        return self.model_dump(exclude_unset=True)

    def to_bytes(self) -> bytes:
        text = json.dumps(self.content(), sort_keys=True, indent=1, allow_nan=False)
        return text.encode() + b"\n"

    @cached_property
    def digest(self) -> str:
        """sha256 of the manifest's file: what a training run pins."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def check_key(key: str) -> None:
    """Refuse a key that is not a plain path under generations/."""
    plain = _KEY.fullmatch(key) and ".." not in key and "//" not in key
    if not plain or not key.startswith("generations/"):
        raise ValueError(f"key {key!r} is not a plain path under generations/")
