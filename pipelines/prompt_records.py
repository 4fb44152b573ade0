"""Landed prompts in a data set: their tables, and the record that says what they were made from.

prompts/<digest>.parquet           rows of the recipe's size
prompts/<digest>-<H>x<W>.parquet   rows of that size, for each other size
prompts/sources/<key>.json         source files and settings → the tables, written after them
"""

import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from typing import Any

from dmd_core.files import is_local, write_atomic
from pipelines.prompt_files import PromptError
from pipelines.storage import Store

RECORD_FORMAT = 1
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

        A table that is there already, with the same number of bytes, is left alone.
        """
        tables = [
            {
                "rows": table.rows,
                "height": table.height,
                "width": table.width,
                "bytes": os.path.getsize(table.path),
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
        landed, sizes = _parse(record, root)
        for table, file, size in zip(self.tables, landed.files, sizes, strict=True):
            if _size_at(root, file.path) != size:
                _put(table.path, root, file.path)
        # Last: whoever finds the record finds the tables.
        write_atomic(root.fs, _record_path(root, self.key), json.dumps(record, indent=1).encode())
        return landed


def find_record(root: Store, key: str) -> LandedPrompts | None:
    """What was published as `key`; None: nothing, or one of its tables is gone.

    Raises `PromptError` for a damaged record.
    """
    path = _record_path(root, key)
    try:
        raw: Any = root.fs.cat_file(path)
    except FileNotFoundError:
        return None
    try:
        landed, sizes = _parse(json.loads(raw), root)
    except (ValueError, KeyError, TypeError) as error:
        raise PromptError(
            f"{path}: not a record of landed prompts ({error!r}); remove it and run the same "
            "command again"
        ) from error
    found = all(_size_at(root, f.path) == s for f, s in zip(landed.files, sizes, strict=True))
    return landed if found else None


def _record_path(root: Store, key: str) -> str:
    return root.path("prompts", "sources", f"{key}.json")


def _parse(record: Any, root: Store) -> tuple[LandedPrompts, list[int]]:
    """A record's tables under `root`, and the bytes of each; an error for what is no record.

    A table's path follows from digest and size: no record can point elsewhere.
    """
    digest = record["digest"]
    if record["format"] != RECORD_FORMAT or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"format {record['format']!r}, digest {digest!r}")
    files, sizes = [], []
    for table in record["tables"]:
        height, width = table["height"], table["width"]
        plain = height is None and width is None
        size = "" if plain else f"-{_count(height)}x{_count(width)}"
        path = root.path("prompts", f"{digest}{size}.parquet")
        files.append(LandedFile(path, _count(table["rows"]), height, width))
        sizes.append(_count(table["bytes"]))
    rows = sum(file.rows for file in files)
    if not files or rows != record["rows"]:
        raise ValueError(f"{record['rows']!r} rows, {rows} in its tables")
    return LandedPrompts(tuple(files), rows, digest, _count(record["duplicates"], least=0)), sizes


def _count(value: Any, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} in place of a number from {least}")
    return value


def _size_at(root: Store, path: str) -> int | None:
    try:
        return int(root.fs.info(path)["size"])
    except FileNotFoundError:
        return None


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
