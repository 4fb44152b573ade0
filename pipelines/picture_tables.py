"""Real pictures in Parquet files: a row group is read whole, once for all of its pictures."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.pair_order import WINDOW_ROW_GROUPS, RowOrder
from pipelines.parquet_parts import open_parts
from pipelines.storage import Store

_PICTURE_COLUMNS, _CAPTION_COLUMNS = ("image", "picture", "png"), ("prompt", "text", "caption")
# A worker holds the row groups of a window: 2 GB of them at most.
_LARGEST_ROW_GROUP = 256 << 20  # bytes of its pictures


class PictureError(ValueError):
    """Real pictures that cannot be used; names the file."""


@dataclass(frozen=True)
class PictureRef:
    """One real picture: its file inside the store, its row and row group there (Parquet), and its
    caption."""

    key: str
    row: int
    prompt: str
    group: int = 0


def refs_of_table(store: Store, key: str) -> list[PictureRef]:
    """The pictures of a file with columns image and prompt. Raises `PictureError`, also for row
    groups that are too large to be read for a few pictures."""
    path = store.path(key)
    try:
        with open_parts(store, path) as file:
            picture = _column(file.schema_arrow, _PICTURE_COLUMNS, path)
            name = _column(file.schema_arrow, _CAPTION_COLUMNS, path)
            _refuse_large(file.metadata, picture, path)
            prompts = file.read(columns=[name])[name].to_pylist()
            metadata = file.metadata
    except (pa.ArrowException, OSError) as error:
        raise PictureError(f"{path} cannot be read: {error}") from error
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    groups = np.repeat(np.arange(len(counts)), counts).tolist()
    rows = enumerate(zip(prompts, groups, strict=True))
    return [PictureRef(key, row, prompt or "", group) for row, (prompt, group) in rows]


class PictureTables:
    """The pictures `refs` of Parquet files, in an order that keeps reading local.

    Epoch e visits permutation(seed, e) of them, as training visits the rows of pairs: row groups
    at random, then rows shuffled within a window of a few. One reader of the stream reads each row
    group once per epoch.
    """

    def __init__(self, store: Store, refs: Sequence[PictureRef], seed: int) -> None:
        self._store = store
        found = [(place, len(list(of_it))) for place, of_it in groupby(refs, key=_place)]
        self._groups, counts = [place for place, _ in found], [count for _, count in found]
        self._starts = np.cumsum([0, *counts])
        self._order = RowOrder(counts, seed)
        self._read: OrderedDict[int, pa.ChunkedArray] = OrderedDict()  # of the window

    def rows_from(self, position: int, count: int) -> list[int]:
        """`count` pictures (indices of `refs`) of the stream, from `position` on."""
        return self._order.rows_from(position, count).tolist()

    def cells(self, rows: Sequence[int]) -> Iterator[bytes]:
        """The bytes of each picture: a binary cell, or the `bytes` of the `datasets` library's
        struct."""
        for row in rows:
            number = int(np.searchsorted(self._starts, row, side="right")) - 1
            cell = self._group(number)[row - int(self._starts[number])].as_py()
            yield (cell["bytes"] if isinstance(cell, dict) else cell) or b""

    def _group(self, number: int) -> pa.ChunkedArray:
        if number not in self._read:
            if len(self._read) == WINDOW_ROW_GROUPS:
                self._read.popitem(last=False)
            self._read[number] = _read_group(self._store, *self._groups[number])
        self._read.move_to_end(number)
        return self._read[number]


def _place(ref: PictureRef) -> tuple[str, int]:
    return ref.key, ref.group


def _read_group(store: Store, key: str, group: int) -> pa.ChunkedArray:
    path = store.path(key)
    try:
        with open_parts(store, path) as file:
            name = _column(file.schema_arrow, _PICTURE_COLUMNS, path)
            return file.read_row_group(group, columns=[name])[name]
    except pa.ArrowException as error:
        raise PictureError(f"{path} cannot be read: {error}") from error


def _refuse_large(metadata: pq.FileMetaData, column: str, path: str) -> None:
    sizes = [
        _bytes_of(metadata.row_group(group), column) for group in range(metadata.num_row_groups)
    ]
    if max(sizes, default=0) > _LARGEST_ROW_GROUP:
        name = path.rpartition("/")[2].removesuffix(".parquet")
        raise PictureError(
            f"{path} has a row group with {max(sizes) >> 20} MiB of pictures, all of which would "
            f"be read for a few of them; expected at most {_LARGEST_ROW_GROUP >> 20} MiB. To write "
            "it anew, with pyarrow.parquet as pq: "
            f'file = pq.ParquetFile("{name}.parquet"); '
            f'new = pq.ParquetWriter("{name}.parquet.new", file.schema_arrow); '
            "[new.write_batch(rows) for rows in file.iter_batches(100)]; new.close(); "
            f"then move {name}.parquet.new to {name}.parquet"
        )


def _bytes_of(group: Any, column: str) -> int:
    """Decoded, of a column and of what it holds where it is a struct."""
    parts = (group.column(index) for index in range(group.num_columns))
    return sum(
        part.total_uncompressed_size
        for part in parts
        if part.path_in_schema.split(".")[0] == column
    )


def _column(schema: pa.Schema, names: Sequence[str], path: str) -> str:
    for name in names:
        if name in schema.names:
            return name
    raise PictureError(f"{path} has columns {schema.names}; expected one of {', '.join(names)}")
