"""Station 1: prompts → rows (pair_id, prompt, seed, negative_prompt), landed as Parquet files.

A row depends only on its own prompt (and negative prompt and size, if it has them), its sample
index and the data-set seed. Adding a line, or moving one, therefore changes no other row, and the
landed table is a set: it is kept in order of pair_id, and its files are named by the digest of its
content. Rows with a size of their own lie apart, a file per size, for a batch has one shape.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dmd_core.noise import stable_seed
from pipelines.config import StorageSection
from pipelines.prompt_files import (
    PromptError,
    PromptFile,
    PromptSource,
    hash_file,
    list_files,
    read_rows,
)
from pipelines.prompt_records import (
    RECORD_FORMAT,
    LandedFile,
    LandedPrompts,
    PreparedPrompts,
    PreparedTable,
    find_record,
)
from pipelines.prompt_rows import SIDE_STEP, PromptRow
from pipelines.prompt_sort import LANDED, SPILLED, RowBuckets, SameIdError, TableFiles
from pipelines.storage import Store

__all__ = [
    "LandedFile",
    "LandedPrompts",
    "PreparedPrompts",
    "PromptError",
    "PromptList",
    "PromptSource",
    "find_landed",
    "land_prompts",
    "prepare_prompts",
    "read_prompts",
]

_MAX_SIZES = 64  # each keeps a Parquet file open, and compiles the teacher anew
_CHUNK_ROWS, _CHUNK_CHARACTERS = 32_768, 32 << 20


@dataclass(frozen=True)
class PromptList:
    """Distinct prompts in the order of the files, and how many repeated ones were dropped."""

    prompts: tuple[str, ...]
    duplicates: int

    @property
    def digest(self) -> str:
        """Names the list, so that a resumed run knows it reads the same one."""
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()


def land_prompts(
    source: PromptSource | str,
    options: StorageSection | None,
    target: Store,
    *,
    seed: int,
    samples_per_prompt: int,
) -> LandedPrompts:
    """Read the prompts of `source` and write their rows under `target`/prompts.

    Raises `PromptError` for a file that cannot be used; nothing is written then.
    """
    with tempfile.TemporaryDirectory(prefix="dmd-prompts-") as folder:
        prepared = prepare_prompts(
            source, options, folder, seed=seed, samples_per_prompt=samples_per_prompt
        )
        return prepared.publish(target)


def find_landed(
    source: PromptSource | str,
    options: StorageSection | None,
    root: Store,
    *,
    seed: int,
    samples_per_prompt: int,
    whole: bool = False,
) -> LandedPrompts | None:
    """What was landed from these very bytes with these settings; None: not yet, or a table is gone
    (with `whole`: or damaged).

    Reads the bytes of the source files, but not their rows.
    """
    source = _as_source(source)
    key = _source_key(list_files(source, options), source, seed, samples_per_prompt)
    return find_record(root, key, whole=whole)


def read_prompts(source: PromptSource | str, options: StorageSection | None = None) -> PromptList:
    """The distinct prompts of a source, without their negative prompts and sizes; nothing is
    written."""
    source = _as_source(source)
    seen: dict[str, None] = {}
    count = 0
    for row in _read(list_files(source, options), source):
        seen[row.prompt] = None
        count += 1
    return PromptList(tuple(seen), count - len(seen))


def prepare_prompts(
    source: PromptSource | str,
    options: StorageSection | None,
    folder: str,
    *,
    seed: int,
    samples_per_prompt: int,
) -> PreparedPrompts:
    """Read the prompts of `source` and write their tables into the local `folder`.

    Memory does not grow with the number of prompts; `folder` holds the rows twice for a while.
    """
    source = _as_source(source)
    files = list_files(source, options)
    stamps = _stamps(files)
    key = _source_key(files, source, seed, samples_per_prompt)
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as spilled:
        buckets = RowBuckets(spilled)
        try:
            _spill(_read(files, source), seed, samples_per_prompt, buckets)
        finally:
            buckets.close()
        for file, before, after in zip(files, stamps, _stamps(files), strict=True):
            if before != after:
                raise PromptError(
                    f"{file.name}: changed while it was read; run the same command again"
                )
        tables, digest = _merge(buckets, seed, folder)
    rows = sum(table.rows for table in tables)
    return PreparedPrompts(tables, rows, digest, buckets.duplicates, key)


# ---------------------------------------------------------------- reading


def _as_source(source: PromptSource | str) -> PromptSource:
    return PromptSource((source,)) if isinstance(source, str) else source


def _names(source: PromptSource) -> str:
    more = len(source.files) - 3
    return ", ".join(source.files[:3]) + (f" and {more} more" if more > 0 else "")


def _read(files: Iterable[PromptFile], source: PromptSource) -> Iterator[PromptRow]:
    empty = True
    for file in files:
        for row in read_rows(file, source.column, source.side_step):
            empty = False
            yield row
    if empty:
        raise PromptError(f"{_names(source)}: holds no prompts; expected at least one")


def _stamps(files: Sequence[PromptFile]) -> list[str]:
    """One per file: another one if the file was written to."""
    return [file.fs.ukey(file.path) for file in files]


def _source_key(
    files: Sequence[PromptFile], source: PromptSource, seed: int, samples_per_prompt: int
) -> str:
    """Equal bytes under another suffix are other prompts: the kind of each file is a part. So is a
    `side_step` of the teacher's: what was landed for another one was not checked for this."""
    hashes = [[file.kind, hash_file(file)] for file in files]
    parts = [RECORD_FORMAT, source.column, seed, samples_per_prompt, hashes]
    if source.side_step != SIDE_STEP:
        parts.append(source.side_step)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# ---------------------------------------------------------------- rows


def _identity(use: str, seed: int, row: PromptRow, sample: int) -> int:
    """What a row does not have is no part, so that plain prompts keep their ids."""
    negative = () if row.negative_prompt is None else ("negative", row.negative_prompt)
    size = () if row.height is None or row.width is None else ("size", row.height, row.width)
    return stable_seed(use, seed, row.prompt, sample, *negative, *size)


def _chunks(rows: Iterable[PromptRow], samples: int) -> Iterator[list[PromptRow]]:
    chunk, characters = [], 0
    for row in rows:
        chunk.append(row)
        characters += len(row.prompt) + len(row.negative_prompt or "")
        if len(chunk) * samples >= _CHUNK_ROWS or characters * samples >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _numbered(rows: Sequence[PromptRow], seed: int, samples: int) -> pa.Table:
    """Each row `samples` times, with its ids."""
    found = [(_identity("pair", seed, r, i), *r, i) for r in rows for i in range(samples)]
    return pa.table([list(column) for column in zip(*found, strict=True)], schema=SPILLED)


def _spill(rows: Iterable[PromptRow], seed: int, samples: int, buckets: RowBuckets) -> None:
    sizes = set()
    for chunk in _chunks(rows, samples):
        buckets.add(_numbered(chunk, seed, samples))
        sizes.update((row.height, row.width) for row in chunk)
        if len(sizes) > _MAX_SIZES:
            raise PromptError(
                f"the prompts have more than {_MAX_SIZES} different sizes; expected at most "
                f"{_MAX_SIZES}, for each makes batches of its own"
            )


def _merge(buckets: RowBuckets, seed: int, folder: str) -> tuple[tuple[PreparedTable, ...], str]:
    """The tables, and the digest of all rows in order of pair_id."""
    digest, tables = hashlib.sha256(), TableFiles(folder)
    try:
        for bucket in buckets.sorted():
            tables.add(_finished(bucket, seed, digest), bucket["height"], bucket["width"])
    except SameIdError as error:
        one, other = error.prompts
        raise PromptError(
            f"prompts {one!r} and {other!r} have the same id {error.pair_id}; "
            "choose another data-set seed"
        ) from error
    finally:
        written = tables.close()
    landed = [PreparedTable(path, n, *(size or (None, None))) for size, path, n in written]
    return tuple(landed), digest.hexdigest()


def _finished(table: pa.Table, seed: int, digest: Any) -> pa.Table:
    """Distinct rows in order of pair_id → the same with their seeds; `digest` takes them in.

    It is a digest of the rows themselves: the same under any version of the Parquet writer.
    """
    ids, prompts, negatives, heights, widths, samples = (c.to_pylist() for c in table.columns)
    seeds = []
    rows = map(PromptRow, prompts, negatives, heights, widths)
    for pair_id, row, sample in zip(ids, rows, samples, strict=True):
        noise = _identity("noise", seed, row, sample)
        seeds.append(noise)
        own = () if row[1:] == (None, None, None) else row[1:]
        digest.update(json.dumps((pair_id, row.prompt, noise, *own)).encode() + b"\n")
    columns = [table["pair_id"], table["prompt"], pa.array(seeds), table["negative_prompt"]]
    return pa.table(columns, schema=LANDED)
