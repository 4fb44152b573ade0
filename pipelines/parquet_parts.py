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


def parquet_file(
    store: Store,
    stream: pa.NativeFile,
    *,
    metadata: pq.FileMetaData | None = None,
    checksums: bool = False,
) -> pq.ParquetFile:
    """On a `part_stream`. `metadata`: its footer, where that is known; `checksums`: compare those
    of its pages."""
    # Ranges that lie close together are one request; on a local disk that only costs.
    ahead = not is_local(store.fs)
    return pq.ParquetFile(
        stream, metadata=metadata, pre_buffer=ahead, page_checksum_verification=checksums
    )


@contextmanager
def open_parts(store: Store, path: str, *, checksums: bool = False) -> Iterator[pq.ParquetFile]:
    """The `parquet_file`, open. Raises what the store or Arrow raises."""
    with part_stream(store, path) as stream:
        yield parquet_file(store, stream, checksums=checksums)
