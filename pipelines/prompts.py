"""Station 1: a prompt list → rows (pair_id, prompt, seed), landed as one Parquet file.

A row depends only on its text, its sample index and the data-set seed. Adding a line, or moving
one, therefore changes no other row, and the landed table is a set: it is kept in order of pair_id,
and its file is named by the digest of its content.
"""

import csv
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from dmd_core.files import write_atomic
from dmd_core.noise import stable_seed
from pipelines.config import StorageSection
from pipelines.storage import Store, open_store

MAX_PROMPT_CHARACTERS = 10_000
# Small row groups: the id filter of a resumed run streams through them.
_ROW_GROUP_ROWS = 65_536
_COLUMN = "prompt"
_SCHEMA = pa.schema([("pair_id", pa.int64()), ("prompt", pa.string()), ("seed", pa.int64())])


class PromptError(ValueError):
    """A prompt file that cannot be used; names the file and, where there is one, the line."""


@dataclass(frozen=True)
class PromptList:
    """Distinct prompts in the order of the file, and how many repeated ones were dropped."""

    prompts: tuple[str, ...]
    duplicates: int


@dataclass(frozen=True)
class LandedPrompts:
    """The landed table: `path` inside the data set's store, its rows and the digest of its rows."""

    path: str
    rows: int
    digest: str
    duplicates: int


def land_prompts(
    source: str,
    options: StorageSection | None,
    target: Store,
    *,
    seed: int,
    samples_per_prompt: int,
) -> LandedPrompts:
    """Read the prompt file `source` and write its rows under `target`/prompts.

    Raises `PromptError` for a file that cannot be used.
    """
    found = read_prompts(source, options)
    table = _to_table(found.prompts, seed=seed, samples_per_prompt=samples_per_prompt)
    digest = _digest(table)
    path = target.path("prompts", f"{digest}.parquet")
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=_ROW_GROUP_ROWS)
    write_atomic(target.fs, path, buffer.getvalue())
    return LandedPrompts(path, table.num_rows, digest, found.duplicates)


def read_prompts(source: str, options: StorageSection | None = None) -> PromptList:
    """The prompts of a txt, csv, jsonl or parquet file, local or s3://. Nothing is written."""
    readers = {"txt": _from_txt, "csv": _from_csv, "jsonl": _from_jsonl, "parquet": _from_parquet}
    suffix = source.rsplit(".", 1)[-1].lower()
    if suffix not in readers:
        raise PromptError(f"{source}: expected a file that ends in .txt, .csv, .jsonl or .parquet")
    raw = _read_bytes(source, options)
    seen: dict[str, None] = {}
    count = 0
    for place, text in readers[suffix](source, raw):
        seen[_checked(text, place)] = None
        count += 1
    if not seen:
        raise PromptError(f"{source}: holds no prompts; expected at least one")
    return PromptList(tuple(seen), count - len(seen))


def _read_bytes(source: str, options: StorageSection | None) -> bytes:
    store = open_store(source, options)
    try:
        return cast(bytes, store.fs.cat_file(store.root))
    except FileNotFoundError as error:
        raise PromptError(f"{source}: no such file") from error
    except IsADirectoryError as error:
        raise PromptError(f"{source}: is a folder; expected a file of prompts") from error


# ---------------------------------------------------------------- formats: (place, text) per prompt


def _from_txt(source: str, raw: bytes) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(re.split(r"\r\n|\n|\r", _decode(source, raw)), start=1):
        if line.strip():
            yield f"{source}, line {number}", line


def _from_csv(source: str, raw: bytes) -> Iterator[tuple[str, str]]:
    rows = csv.DictReader(io.StringIO(_decode(source, raw), newline=""), strict=True)
    try:
        if rows.fieldnames is None:
            return
        _require_column(source, list(rows.fieldnames))
        for row in rows:
            yield f"{source}, line {rows.line_num}", row[_COLUMN] or ""
    except csv.Error as error:
        raise PromptError(f"{source}, line {rows.reader.line_num}: not CSV: {error}") from error


def _from_jsonl(source: str, raw: bytes) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(re.split(r"\r\n|\n|\r", _decode(source, raw)), start=1):
        if not line.strip():
            continue
        place = f"{source}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{place}: not JSON: {error}") from error
        if not isinstance(value, dict) or not isinstance(value.get(_COLUMN), str):
            raise PromptError(f'{place}: expected {{"{_COLUMN}": "…"}}, found {line[:80]}')
        yield place, value[_COLUMN]


def _from_parquet(source: str, raw: bytes) -> Iterator[tuple[str, str]]:
    try:
        file = pq.ParquetFile(io.BytesIO(raw))
        _require_column(source, file.schema_arrow.names)
        kind = file.schema_arrow.field(_COLUMN).type
        text = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
            raise PromptError(f"{source}: column {_COLUMN!r} is {kind}; expected string")
        values = file.read(columns=[_COLUMN])[_COLUMN].to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise PromptError(f"{source}: not a Parquet file: {error}") from error
    for number, value in enumerate(values, start=1):
        yield f"{source}, row {number}", value or ""


def _require_column(source: str, names: Iterable[str]) -> None:
    if _COLUMN not in names:
        found = ", ".join(map(repr, names)) or "none"
        raise PromptError(f"{source}: no column {_COLUMN!r}; found {found}")


def _decode(source: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise PromptError(
            f"{source}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8 text"
        ) from error


def _checked(text: str, place: str) -> str:
    """The prompt as it is stored: NFC, without surrounding white space."""
    prompt = unicodedata.normalize("NFC", text).strip()
    if not prompt:
        raise PromptError(f"{place}: empty prompt")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise PromptError(
            f"{place}: a prompt of {len(prompt):,} characters; "
            f"expected at most {MAX_PROMPT_CHARACTERS:,}"
        )
    for character in prompt:
        # Cc: control characters; Cs: half of a surrogate pair, which UTF-8 cannot hold.
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\r\n":
            raise PromptError(
                f"{place}: control character U+{ord(character):04X}; expected plain text"
            )
    return prompt


# ---------------------------------------------------------------- rows


def _to_table(prompts: tuple[str, ...], *, seed: int, samples_per_prompt: int) -> pa.Table:
    rows: dict[int, tuple[str, int]] = {}
    for prompt in prompts:
        for index in range(samples_per_prompt):
            pair_id = stable_seed("pair", seed, prompt, index)
            if pair_id in rows:
                raise PromptError(
                    f"prompts {rows[pair_id][0]!r} and {prompt!r} have the same id {pair_id}; "
                    "choose another data-set seed"
                )
            rows[pair_id] = (prompt, stable_seed("noise", seed, prompt, index))
    ids = sorted(rows)
    columns = [ids, [rows[key][0] for key in ids], [rows[key][1] for key in ids]]
    return pa.table(columns, schema=_SCHEMA)


def _digest(table: pa.Table) -> str:
    """sha256 of the rows themselves: the same under any version of the Parquet writer."""
    digest = hashlib.sha256()
    for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()
