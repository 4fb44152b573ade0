"""Landed prompts in a data set: their tables, and the record that says what they were made from.

prompts/<digest>.parquet           rows of the recipe's size
prompts/<digest>-<H>x<W>.parquet   rows of that size, for each other size
prompts/sources/<key>.json         source files and settings → the tables, written after them
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from typing import Any, cast

from dmd_core.files import is_local, write_atomic
from pipelines.prompt_files import PromptError
from pipelines.storage import Store, open_store

RECORD_FORMAT = 2
_PART_BYTES = 16 << 20  # of a multipart upload; ten parts are in memory at once


@dataclass(frozen=True)
class LandedFile:
    """One landed table: `path` inside the data set's store; the size of its rows in pixels (None:
    the recipe's)."""

    path: str
    rows: int
    height: int | None
    width: int | None


@dataclass(frozen=True)
class LandedPrompts:
    """The landed tables, the rows of all together and the digest of these rows; `duplicates`:
    repeated rows of the source, which count once."""

    files: tuple[LandedFile, ...]
    rows: int
    digest: str
    duplicates: int


@dataclass(frozen=True)
class PreparedTable:
    """A table at the local `path`; height and width as in `LandedFile`."""

    path: str
    rows: int
    height: int | None
    width: int | None


@dataclass(frozen=True)
class PreparedPrompts:
    """Tables in a local folder, not yet published. `key` names the source files' bytes and the
    settings they were made from."""

    tables: tuple[PreparedTable, ...]
    rows: int
    digest: str
    duplicates: int
    key: str

    def publish(self, root: Store) -> LandedPrompts:
        """Put the tables under `root`/prompts, each whole or not at all, then the record.

        A table that is there already, byte for byte, is left alone.
        """
        tables = [
            {
                "rows": table.rows,
                "height": table.height,
                "width": table.width,
                "bytes": os.path.getsize(table.path),
                "sha256": _sha256(open_store(table.path)),
            }
            for table in self.tables
        ]
        record = {
            "format": RECORD_FORMAT,
            "digest": self.digest,
            "rows": self.rows,
            "duplicates": self.duplicates,
            "tables": tables,
        }
        landed, marks = _parse(record, root)
        for table, file, mark in zip(self.tables, landed.files, marks, strict=True):
            if not mark.fits(root, file.path, whole=True):
                _put(table.path, root, file.path)
        # Last: whoever finds the record finds the tables.
        write_atomic(root.fs, _record_path(root, self.key), json.dumps(record, indent=1).encode())
        return landed


def find_record(root: Store, key: str, *, whole: bool = False) -> LandedPrompts | None:
    """What was published as `key`; None: nothing, or one of its tables is gone or has another
    size; with `whole` also when its bytes are others.

    Raises `PromptError` for a damaged record.
    """
    path = _record_path(root, key)
    try:
        raw: Any = root.fs.cat_file(path)
    except FileNotFoundError:
        return None
    try:
        landed, marks = _parse(json.loads(raw), root)
    except (ValueError, KeyError, TypeError) as error:
        raise PromptError(
            f"{path}: not a record of landed prompts ({error!r}); remove it and run the same "
            "command again"
        ) from error
    found = zip(landed.files, marks, strict=True)
    return landed if all(mark.fits(root, file.path, whole=whole) for file, mark in found) else None


@dataclass(frozen=True)
class _Mark:
    """What a table's bytes must be."""

    size: int
    sha256: str

    def fits(self, root: Store, path: str, *, whole: bool) -> bool:
        try:
            same = int(root.fs.info(path)["size"]) == self.size
        except FileNotFoundError:
            return False
        return same and (not whole or _sha256(Store(root.fs, path)) == self.sha256)


def _sha256(file: Store) -> str:
    with file.fs.open(file.root, "rb") as stream:
        return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()


def _record_path(root: Store, key: str) -> str:
    return root.path("prompts", "sources", f"{key}.json")


def _parse(record: Any, root: Store) -> tuple[LandedPrompts, list[_Mark]]:
    """A record's tables under `root`, and the marks of each; an error for what is no record.

    A table's path follows from digest and size: no record can point elsewhere.
    """
    digest = record["digest"]
    if record["format"] != RECORD_FORMAT or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"format {record['format']!r}, digest {digest!r}")
    files, marks = [], []
    for table in record["tables"]:
        height, width = table["height"], table["width"]
        plain = height is None and width is None
        size = "" if plain else f"-{_count(height)}x{_count(width)}"
        path = root.path("prompts", f"{digest}{size}.parquet")
        files.append(LandedFile(path, _count(table["rows"]), height, width))
        marks.append(_Mark(_count(table["bytes"]), str(table["sha256"])))
    rows = sum(file.rows for file in files)
    if not files or rows != record["rows"]:
        raise ValueError(f"{record['rows']!r} rows, {rows} in its tables")
    return LandedPrompts(tuple(files), rows, digest, _count(record["duplicates"], least=0)), marks


def _count(value: Any, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} in place of a number from {least}")
    return value


def _put(local: str, root: Store, path: str) -> None:
    """A reader sees the whole file or none; a big one is not read into memory."""
    if not is_local(root.fs):
        root.fs.put_file(local, path, chunksize=_PART_BYTES)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        shutil.copyfile(local, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
