"""Sorting prompt rows that do not fit into memory, on the local disk.

Rows are spilled into buckets by the high bits of pair_id, so that one bucket after the other, each
sorted in memory, is the order of pair_id over all rows.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Size = tuple[int, int]  # (height, width), in pixels

ID_BITS = 63
# 128 files open at once, below every common limit; 100 million rows are 0.8 million to a bucket.
_BUCKET_BITS = 7
# Small row groups: the id filter of a resumed run streams through them.
_ROW_GROUP_ROWS = 65_536

SPILLED = pa.schema(
    [
        ("pair_id", pa.int64()),
        ("prompt", pa.string()),
        ("negative_prompt", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("sample", pa.int32()),
    ]
)
LANDED = pa.schema(
    [
        ("pair_id", pa.int64()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("negative_prompt", pa.string()),
    ]
)


class SameIdError(ValueError):
    """Two different rows with one pair_id: `prompts` are theirs."""

    def __init__(self, pair_id: int, prompts: tuple[str, str]) -> None:
        super().__init__(f"{prompts} have the same id {pair_id}")
        self.pair_id, self.prompts = pair_id, prompts


class RowBuckets:
    """Rows of schema `SPILLED`, kept in the empty `folder`; read once, sorted, without repeats."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._shift = ID_BITS - _BUCKET_BITS
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        self._streams = ExitStack()
        self.duplicates = 0  # repeated input rows, known once `sorted` is through

    def add(self, table: pa.Table) -> None:
        buckets = table["pair_id"].to_numpy() >> self._shift
        order = np.argsort(buckets, kind="stable")
        table = table.take(pa.array(order))
        found, starts = np.unique(buckets[order], return_index=True)
        ends = [*starts[1:], len(order)]
        for bucket, start, end in zip(found.tolist(), starts.tolist(), ends, strict=True):
            if bucket not in self._writers:
                sink = self._streams.enter_context(pa.OSFile(self._path(bucket), "wb"))
                writer = self._streams.enter_context(pa.ipc.new_stream(sink, SPILLED))
                self._writers[bucket] = writer
            self._writers[bucket].write_table(table.slice(start, end - start))

    def close(self) -> None:
        self._streams.close()

    def sorted(self) -> Iterator[pa.Table]:
        """One table per bucket, after `close`. Raises `SameIdError`."""
        for bucket in sorted(self._writers):
            with pa.OSFile(self._path(bucket)) as file, pa.ipc.open_stream(file) as reader:
                table = reader.read_all()
            os.remove(self._path(bucket))
            yield self._distinct(table)

    def _distinct(self, table: pa.Table) -> pa.Table:
        ids = table["pair_id"].to_numpy()
        order = np.argsort(ids, kind="stable")
        table, ids = table.take(pa.array(order)), ids[order]
        repeat = np.flatnonzero(ids[1:] == ids[:-1]) + 1
        if repeat.size == 0:
            return table
        before, after = table.take(pa.array(repeat - 1)), table.take(pa.array(repeat))
        if not before.equals(after):
            _refuse(before, after)
        self.duplicates += int(np.count_nonzero(after["sample"].to_numpy() == 0))
        keep = np.ones(len(ids), dtype=bool)
        keep[repeat] = False
        return table.filter(pa.array(keep))

    def _path(self, bucket: int) -> str:
        return os.path.join(self._folder, f"{bucket}.arrow")


def _refuse(before: pa.Table, after: pa.Table) -> None:
    for one, other in zip(before.to_pylist(), after.to_pylist(), strict=True):
        if one != other:
            raise SameIdError(one["pair_id"], (one["prompt"], other["prompt"]))


class TableFiles:
    """Parquet files of schema `LANDED` under `folder`, one per size, in the order of adding."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._files: dict[Size | None, _TableFile] = {}

    def add(self, table: pa.Table, heights: pa.ChunkedArray, widths: pa.ChunkedArray) -> None:
        """Rows and, beside them, the sizes (null: none of its own)."""
        codes = _number(heights) << 32 | _number(widths)
        for code in np.unique(codes).tolist():
            size = (code >> 32, code & 0xFFFFFFFF) if code else None
            if size not in self._files:
                name = "plain" if size is None else "x".join(map(str, size))
                self._files[size] = _TableFile(os.path.join(self._folder, f"{name}.parquet"))
            self._files[size].add(table.filter(pa.array(codes == code)))

    def close(self) -> list[tuple[Size | None, str, int]]:
        """(size, path, rows) of each file: the rows without a size first, then by size."""
        for file in self._files.values():
            file.close()
        order = sorted(self._files, key=lambda size: size or (0, 0))
        return [(size, self._files[size].path, self._files[size].rows) for size in order]


def _number(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(column, 0).to_numpy().astype(np.int64)


class _TableFile:
    """Row groups are cut by number of rows alone, so that the bytes do not show the buckets."""

    def __init__(self, path: str) -> None:
        self.path, self.rows = path, 0
        self._pending = LANDED.empty_table()
        self._writer = pq.ParquetWriter(path, LANDED)

    def add(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        self._pending = pa.concat_tables([self._pending, table])
        while self._pending.num_rows >= _ROW_GROUP_ROWS:
            self._write(self._pending.slice(0, _ROW_GROUP_ROWS))
            self._pending = self._pending.slice(_ROW_GROUP_ROWS)

    def close(self) -> None:
        if self._pending.num_rows:
            self._write(self._pending)
        self._writer.close()

    def _write(self, table: pa.Table) -> None:
        # One chunk per column: the writer's pages follow the chunks.
        self._writer.write_table(table.combine_chunks(), row_group_size=_ROW_GROUP_ROWS)
