"""Parquet files of which a part is read: the footer, some columns, or some row groups."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from dmd_core.files import is_local
from pipelines.storage import Store


def part_stream(store: Store, path: str) -> pa.NativeFile:
    """The file, of which nothing is fetched but what Arrow asks for. s3fs would read some 50 MiB
    ahead and keep them: a whole file of pairs for one of its columns."""
    if is_local(store.fs):
        return pa.OSFile(path)
    return pa.PythonFile(store.fs.open(path, "rb", cache_type="none"), mode="r")


@contextmanager
def open_parts(store: Store, path: str, *, checksums: bool = False) -> Iterator[pq.ParquetFile]:
    """The Parquet file, open. `checksums`: compare those of its pages. Raises what the store or
    Arrow raises."""
    with part_stream(store, path) as stream:
        # Ranges that lie close together are one request; on a local disk that only costs.
        ahead = not is_local(store.fs)
        yield pq.ParquetFile(stream, pre_buffer=ahead, page_checksum_verification=checksums)
