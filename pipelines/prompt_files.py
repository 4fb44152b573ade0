"""Prompt files: paths, globs and s3:// URLs → checked rows, one at a time.

Files are read in blocks, whatever their size. Every error names the file and the line (the row, in
Parquet).
"""

import codecs
import csv
import glob
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from dmd_core.files import is_local
from pipelines.config import StorageSection
from pipelines.prompt_rows import SIDE_STEP, BadCellError, PromptRow, checked_row, class_label
from pipelines.storage import no_answer, open_store

_LABEL = "class_label"  # read in place of a prompt column that is not there
_OPTIONAL = ("negative_prompt", "height", "width")
_KINDS = {"txt": "txt", "csv": "csv", "jsonl": "jsonl", "ndjson": "jsonl", "parquet": "parquet"}
_BLOCK_BYTES = 1 << 20
_LONGEST_LINE = 16 << 20  # characters; a file without line ends must not fill the memory
_PARQUET_BATCH_ROWS = 16_384
_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)")
_STRINGS = ("string", "large_string", "string_view")  # Arrow's


class PromptError(ValueError):
    """A prompt file that cannot be used; names the file and, where there is one, the line."""


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from: paths, globs, s3:// URLs, and the column that holds the prompt
    (csv, jsonl, parquet; a txt file has a prompt per line). Sizes that rows have of their own must
    be multiples of `side_step` pixels: the teacher's."""

    files: tuple[str, ...]
    column: str = "prompt"
    side_step: int = SIDE_STEP

    def __post_init__(self) -> None:
        if self.column in _OPTIONAL:
            raise PromptError(
                f"column {self.column!r} has its own meaning; name another for prompts"
            )


@dataclass(frozen=True)
class PromptFile:
    """One file of a source: `name` for messages, `path` inside `fs`."""

    name: str
    kind: str
    fs: AbstractFileSystem
    path: str


def list_files(
    source: PromptSource | str, options: StorageSection | None
) -> tuple[PromptFile, ...]:
    """The files of a source: in the order given, those of one glob sorted, each file once."""
    names = (source,) if isinstance(source, str) else source.files
    found: dict[tuple[bool, str], PromptFile] = {}
    for name in names:
        for file in _expand(name, options):
            found.setdefault((is_local(file.fs), file.path), file)
    if not found:
        raise PromptError("no prompt files given; expected at least one path, glob or s3:// URL")
    return tuple(found.values())


def hash_file(file: PromptFile) -> str:
    """sha256 of the file's bytes."""
    digest = hashlib.sha256()
    for block in _blocks(file):
        digest.update(block)
    return digest.hexdigest()


def read_rows(file: PromptFile, column: str, side_step: int = SIDE_STEP) -> Iterator[PromptRow]:
    """The rows of a file, lazily. Raises `PromptError` at the first bad one. `side_step`: see
    `PromptSource`."""
    readers = {"txt": _from_txt, "csv": _from_csv, "jsonl": _from_jsonl, "parquet": _from_parquet}
    for number, cells in readers[file.kind](file, column):
        try:
            row = checked_row(*cells, side_step=side_step)
        except BadCellError as error:
            raise PromptError(f"{_place(file, number)}: {error}") from None
        yield row


def _expand(name: str, options: StorageSection | None) -> list[PromptFile]:
    store = open_store(name, options)
    fs, path = store.fs, store.root
    try:
        if fs.info(path)["type"] == "directory":
            raise PromptError(f"{name}: is a folder; expected a file of prompts")
        return [_file(name, fs, path)]  # also one whose own name holds * ? or [
    except (FileNotFoundError, NotADirectoryError) as error:
        if not glob.has_magic(path):
            raise PromptError(f"{name}: no such file") from error
    try:
        matches = sorted(str(match) for match in fs.glob(path))
    except FileNotFoundError:  # a bucket that is not there
        matches = []
    files = [match for match in matches if not fs.isdir(match)]
    if not files:
        raise PromptError(f"{name}: matches no file")
    scheme = "" if is_local(fs) else "s3://"
    return [_file(scheme + file, fs, file) for file in files]


def _file(name: str, fs: AbstractFileSystem, path: str) -> PromptFile:
    suffix = path.rsplit(".", 1)[-1].lower()
    if suffix not in _KINDS:
        raise PromptError(f"{name}: expected a file that ends in .txt, .csv, .jsonl or .parquet")
    return PromptFile(name, _KINDS[suffix], fs, path)


def _place(file: PromptFile, number: int) -> str:
    return f"{file.name}, {'row' if file.kind == 'parquet' else 'line'} {number}"


# ------------------------------------------------- formats: (number, cells as found) per prompt


class _Cells(NamedTuple):
    prompt: object
    negative_prompt: object = None
    height: object = None
    width: object = None


def _from_txt(file: PromptFile, column: str) -> Iterator[tuple[int, _Cells]]:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            yield number, _Cells(line)


def _from_csv(file: PromptFile, column: str) -> Iterator[tuple[int, _Cells]]:
    """An empty cell of an optional column is one that was not given: CSV has no null."""
    rows = csv.reader(_lines(file), strict=True)
    try:
        names = next(rows, None)
        if names is None:
            return
        used = _columns(file, names, column)
        places = [names.index(name) if name in names else -1 for name in used]
        for row in rows:
            if len(row) > len(names):
                raise PromptError(
                    f"{_place(file, rows.line_num)}: {len(row)} cells, the header has "
                    f"{len(names)}; put quotes around a prompt that holds a comma"
                )
            if row:
                prompt, *rest = [row[p] if -1 < p < len(row) else "" for p in places]
                cell = _label(prompt, file, rows.line_num) if used[0] != column else prompt
                yield rows.line_num, _Cells(cell, *[text if text else None for text in rest])
    except csv.Error as error:
        raise PromptError(f"{_place(file, rows.line_num)}: not CSV: {error}") from error


def _from_jsonl(file: PromptFile, column: str) -> Iterator[tuple[int, _Cells]]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{_place(file, number)}: not JSON: {error}") from error
        found = value if isinstance(value, dict) else {}
        text = column in found
        prompt = found[column] if text else found.get(_LABEL)
        if type(prompt) not in ((str, int) if text else (int,)):
            raise PromptError(
                f'{_place(file, number)}: expected {{"{column}": "…"}}, found {line.rstrip()[:80]}'
            )
        yield number, _Cells(prompt, *[found.get(name) for name in _OPTIONAL])


def _from_parquet(file: PromptFile, column: str) -> Iterator[tuple[int, _Cells]]:
    number = 0
    try:
        with file.fs.open(file.path, "rb", block_size=4 * _BLOCK_BYTES) as stream:
            table = pq.ParquetFile(stream)
            used = _columns(file, table.schema_arrow.names, column)
            _check_types(file, table.schema_arrow, used, column)
            present = [name for name in used if name in table.schema_arrow.names]
            for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=present):
                absent = [None] * batch.num_rows
                found = [batch[n].to_pylist() if n in present else absent for n in used]
                for cells in zip(*found, strict=True):
                    number += 1
                    yield number, _Cells("" if cells[0] is None else cells[0], *cells[1:])
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, PermissionError) or no_answer(error):
            raise  # the store's answer says nothing about the file
        raise PromptError(f"{file.name}: not a Parquet file: {error}") from error


def _columns(file: PromptFile, names: Sequence[str], column: str) -> tuple[str, ...]:
    """The columns to read, that of the prompt first; an optional one need not be there."""
    used = (column if column in names or _LABEL not in names else _LABEL, *_OPTIONAL)
    if used[0] not in names:
        found = ", ".join(map(repr, names)) or "none"
        raise PromptError(f"{file.name}: no column {column!r}; found {found}")
    for name in used:
        if names.count(name) > 1:
            raise PromptError(f"{file.name}: {names.count(name)} columns {name!r}; expected one")
    return used


def _label(cell: str, file: PromptFile, number: int) -> int:
    try:
        return class_label(cell)
    except BadCellError as error:
        raise PromptError(f"{_place(file, number)}: {error}") from None


def _check_types(file: PromptFile, schema: pa.Schema, used: Sequence[str], column: str) -> None:
    prompt = ("string", "integer") if used[0] == column else ("integer",)
    expected = (prompt, ("string", "null"), ("integer", "null"), ("integer", "null"))
    for name, kinds in zip(used, expected, strict=True):
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        found = "string" if str(value) in _STRINGS else str(value)
        found = "integer" if pa.types.is_integer(value) else found
        if found not in kinds:
            wanted = " or ".join(kind for kind in kinds if kind != "null")
            raise PromptError(f"{file.name}: column {name!r} is {kind}; expected {wanted}")


# ---------------------------------------------------------------- bytes → lines


def _blocks(file: PromptFile) -> Iterator[bytes]:
    # The block size is also how far an object store's reader reads ahead (50 MB if not told).
    with file.fs.open(file.path, "rb", block_size=4 * _BLOCK_BYTES) as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield cast(bytes, block)


def _text(file: PromptFile) -> Iterator[str]:
    """The file's text in pieces; a byte order mark is dropped."""
    decoder, lines = codecs.getincrementaldecoder("utf-8-sig")(), 0
    for block in _ended(_blocks(file)):
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            # `object` holds the block and, in front, the start of a character from the one before.
            line = lines + error.object[: error.start].count(b"\n") + 1
            raise PromptError(
                f"{file.name}, line {line}: byte 0x{error.object[error.start]:02x} "
                "is not UTF-8 text"
            ) from error
        lines += block.count(b"\n")


def _ended(blocks: Iterable[bytes]) -> Iterator[bytes]:
    yield from blocks
    yield b""


def _lines(file: PromptFile) -> Iterator[str]:
    r"""Lines with their ends (\n, \r\n or \r, as in `open(newline="")`)."""
    rest, number = "", 0
    for piece in _text(file):
        text = rest + piece
        # Up to the last line end; a \r at the very end waits, its \n may come with the next piece.
        end = max(text.rfind("\n"), text.rfind("\r", 0, -1)) + 1
        for line in _LINE.findall(text, 0, end):
            number += 1
            yield line
        rest = text[end:]
        if len(rest) > _LONGEST_LINE:
            raise PromptError(
                f"{file.name}, line {number + 1}: longer than {_LONGEST_LINE:,} characters"
            )
    if rest:
        yield rest
