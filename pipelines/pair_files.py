"""The Parquet files of one sealed version, row group by row group, each checked when first read."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmd_core.files import is_local
from pipelines.bounded import map_bounded
from pipelines.manifest_model import Manifest, ManifestFile
from pipelines.pairs import PairSchemaError, check_schema, fingerprint_digest
from pipelines.parquet_parts import parquet_file, part_stream
from pipelines.storage import Store

# To open a file and check its footer costs more than to read a row group. A footer takes some
# 30 KB; an open file a descriptor, too.
_OPEN_FILES = 128
_KEPT_FOOTERS = 2048
_THREADS = 4  # far fewer than open files: none that is being read is closed for another
_LARGE_ROW_GROUP = 1 << 20  # bytes; to hand a smaller one to a thread takes longer than to read it
_Value = TypeVar("_Value")


class PairFileError(RuntimeError):
    """A file of pairs that is not what the manifest says."""


class Layout(NamedTuple):
    """Of the tensors of a pair: (C,h,w) and the dtype they are stored in."""

    shape: tuple[int, ...]
    dtype: str


class PairFiles:
    """Row groups of the version's files. `verify` compares the sha256 of each file, once, when it
    is first read; its size and its rows always. All files have one `Layout`."""

    def __init__(self, root: Store, manifest: Manifest, *, verify: bool) -> None:
        self._root, self._manifest, self._verify = root, manifest, verify
        self._open: _Recent[pq.ParquetFile] = _Recent(_OPEN_FILES)
        self._footers: _Recent[pq.FileMetaData] = _Recent(_KEPT_FOOTERS)  # checked
        row_groups = sum(len(file.row_groups) for file in manifest.files)
        large = sum(file.bytes for file in manifest.files) >= row_groups * _LARGE_ROW_GROUP
        self._in_threads = large or not is_local(root.fs)
        self._verified: set[int] = set()
        self._schema: pa.Schema | None = None  # of the file that was checked last
        self._layout: tuple[Layout, str] | None = None  # of the first file, and its path

    def layout(self) -> Layout:
        """As the first file's footer says."""
        if self._layout is None:
            self._opened(0)
        assert self._layout is not None
        return self._layout[0]

    def read(self, places: Iterable[tuple[int, int]], columns: Sequence[str]) -> list[pa.Table]:
        """Columns of row groups (number of the file, row group), in the given order.

        Where that pays, threads read while this one opens the next file. Row groups of one file
        that follow one another have one thread: an open file is not made for two.
        """
        by_file = groupby(places, key=itemgetter(0))
        opened = ((n, self._opened(n), [group for _, group in found]) for n, found in by_file)
        mapped = partial(map_bounded, workers=_THREADS) if self._in_threads else map
        tables = mapped(lambda file: self._tables(*file, columns), opened)
        return list(chain.from_iterable(tables))

    def _tables(
        self, number: int, parquet: pq.ParquetFile, groups: Sequence[int], columns: Sequence[str]
    ) -> list[pa.Table]:
        path = self._path(number)
        try:
            # Arrow's own threads would take longer to start than so few rows take to read.
            found = [
                parquet.read_row_groups([group], list(columns), use_threads=False)
                for group in groups
            ]
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error
        for table in found:
            for name in columns:
                if table[name].null_count:
                    raise PairFileError(f"{path}: column {name!r} has empty values")
        # What else a schema says may differ from file to file.
        return [table.replace_schema_metadata() for table in found]

    def _path(self, number: int) -> str:
        return self._root.path(self._manifest.files[number].key)

    def _opened(self, number: int) -> pq.ParquetFile:
        found = self._open.get(number)
        if found is None:
            path = self._path(number)
            try:
                found = self._checked(path, number, self._manifest.files[number])
            except (pa.ArrowException, PairSchemaError, OSError) as error:
                raise _unreadable(path, error) from error
            dropped = self._open.put(number, found)
            if dropped is not None:
                dropped.close(force=True)
        return found

    def _checked(self, path: str, number: int, file: ManifestFile) -> pq.ParquetFile:
        with ExitStack() as closing:  # a file that is refused does not stay open
            stream = closing.enter_context(part_stream(self._root, path))
            self._check_bytes(path, number, file, stream)
            known = self._footers.get(number)
            parquet = parquet_file(self._root, stream, metadata=known, checksums=True)
            if known is None:
                self._check_footer(path, file, parquet)
                self._footers.put(number, parquet.metadata)
            closing.pop_all()
        return parquet

    def _check_bytes(
        self, path: str, number: int, file: ManifestFile, stream: pa.NativeFile
    ) -> None:
        size = stream.size()
        if size != file.bytes:
            raise PairFileError(f"{path}: {size} bytes, but the manifest says {file.bytes}")
        if not self._verify or number in self._verified:
            return
        found = _sha256(stream)
        if found != file.sha256:
            raise PairFileError(
                f"{path}: sha256 {found[:16]}…, but the manifest says {file.sha256[:16]}…"
            )
        self._verified.add(number)

    def _check_footer(self, path: str, file: ManifestFile, parquet: pq.ParquetFile) -> None:
        self._check_schema(path, parquet.schema_arrow)
        rows = tuple(parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups))
        if rows != file.row_groups:
            raise PairFileError(
                f"{path}: row groups of {list(rows)} rows, "
                f"but the manifest says {list(file.row_groups)}"
            )

    def _check_schema(self, path: str, schema: pa.Schema) -> None:
        if self._schema is not None and schema.equals(self._schema, check_metadata=True):
            return
        layout, digest = Layout(*check_schema(schema)), fingerprint_digest(schema)
        if digest != self._manifest.fingerprint_digest:
            raise PairFileError(
                f"{path}: made by {digest[:16]}, but version {self._manifest.version} "
                f"holds {self._manifest.fingerprint_digest[:16]}"
            )
        if self._layout is None:
            self._layout = layout, path
        first, its_path = self._layout
        if layout != first:
            raise PairFileError(
                f"{path}: pairs of {layout.shape} {layout.dtype}, but {its_path} holds "
                f"{first.shape} {first.dtype}; expected one shape in a version that is read in "
                "batches: keep prompts of other sizes in a data set of their own"
            )
        self._schema = schema


def _unreadable(path: str, error: Exception) -> PairFileError:
    return PairFileError(f"{path}: cannot be read: {error}")


class _Recent(Generic[_Value]):
    """The `size` things that were used last, each under the number of its file."""

    def __init__(self, size: int) -> None:
        self._size, self._items = size, OrderedDict[int, _Value]()

    def get(self, number: int) -> _Value | None:
        if number in self._items:
            self._items.move_to_end(number)
        return self._items.get(number)

    def put(self, number: int, value: _Value) -> _Value | None:
        """Returns what had to go for it."""
        self._items[number] = value
        return self._items.popitem(last=False)[1] if len(self._items) > self._size else None


def kept_mask(file: ManifestFile) -> np.ndarray:
    """(rows of the file,) bool: which of them belong to the version."""
    keep = np.ones(file.rows, dtype=bool)
    keep[list(file.excluded.rows)] = False
    return keep


def _sha256(stream: pa.NativeFile) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
