"""Evaluation pictures of one system as files: `<first row>.parquet` for each batch, in a folder.

A file is whole or absent, so a killed evaluation loses the batches that were being sampled and no
more; readers take them one by one, for 50,000 large pictures fit in no memory.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from dmd_core.files import write_atomic
from pipelines.bounded import map_bounded
from pipelines.storage import Store
from pipelines.systems import Images

_ARRAYS = {"latents": np.float32, "pictures": np.uint8, "features": np.float32}
_SUFFIX = ".parquet"


def write_part(store: Store, folder: str, start: int, total: int, images: Images) -> None:
    """Rows `start`, `start` + 1, … of `total`."""
    shapes = {name: getattr(images, name).shape[1:] for name in _ARRAYS}
    columns = {name: _raw_rows(getattr(images, name)) for name in _ARRAYS}
    table = pa.table(
        {"prompt": images.prompts, "seed": pa.array(images.seeds, pa.int64()), **columns},
        metadata={"shapes": json.dumps(shapes), "total": str(total)},
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(store.fs, store.path(folder, _name(start)), sink.getvalue().to_pybytes())


def stored_parts(store: Store, folder: str) -> list[int]:
    """The first rows of the files that are there."""
    try:
        paths = store.fs.ls(store.path(folder), detail=False, refresh=True)
    except FileNotFoundError:
        return []
    names = [path.rsplit("/", 1)[-1] for path in paths]
    stems = [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]
    return sorted(int(stem) for stem in stems if stem.isdigit())


def open_images(store: Store, folder: str) -> "StoredImages":
    """A system's pictures. Raises ValueError if they are not whole, or are something else."""
    starts = stored_parts(store, folder)
    if not starts:
        raise ValueError(f"{store.path(folder)} holds no evaluation pictures")
    images = StoredImages(store, folder, tuple(starts))
    total = images.total
    if len(images.prompts) != total:
        raise ValueError(
            f"{store.path(folder)} holds {len(images.prompts)} of {total} evaluation pictures; run "
            "`dmd evaluate` again"
        )
    return images


def stored_whole(store: Store, folder: str) -> bool:
    """Are all pictures of the set there?"""
    try:
        open_images(store, folder)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class StoredImages:
    """The files of `folder` that begin with rows `starts`; nothing is held but what is asked
    for."""

    store: Store
    folder: str
    starts: tuple[int, ...]

    @cached_property
    def total(self) -> int:
        """Rows of the whole set, by its first file."""
        path = self._path(self.starts[0])
        with _named(self._folder), self.store.arrow.open_input_file(path) as file:
            return int((pq.read_schema(file).metadata or {})[b"total"])

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        return tuple(self._column("prompt")["prompt"].to_pylist())

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self._column("seed")["seed"].to_pylist())

    def array(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As `array_of`."""
        first = self.starts[0]
        stop = sys.maxsize if stop is None else stop
        ends = (*self.starts[1:], sys.maxsize)
        spans = [(at - first, end - first) for at, end in zip(self.starts, ends, strict=True)]

        def read(at: int) -> np.ndarray:
            return self._read(at + first, [name])[name][max(0, start - at) : stop - at]

        wanted = [at for at, end in spans if at < stop and end > start]
        if len(wanted) == 1:
            return read(wanted[0])
        return np.concatenate(list(map_bounded(read, wanted)))

    def parts(self) -> Iterator[Images]:
        for start in self.starts:
            found = self._read(start, ["prompt", "seed", *_ARRAYS])
            arrays = {name: found[name] for name in _ARRAYS}
            yield Images(found["prompt"], found["seed"], **arrays)

    def groups(self, rows: int) -> "Mapping[int, StoredImages]":
        """First row → whole files, as many as begin in the same `rows` rows."""
        together = (tuple(found) for _, found in groupby(self.starts, lambda start: start // rows))
        return {starts[0]: StoredImages(self.store, self.folder, starts) for starts in together}

    def first(self, count: int) -> Images:
        """The first `count` of them, or all."""
        found: list[Images] = []
        for part in self.parts():
            found.append(part)
            if sum(len(one.prompts) for one in found) >= count:
                break
        return Images.cat(found).rows(slice(count))

    def _read(self, start: int, names: Sequence[str]) -> dict[str, Any]:
        """Columns of one file: arrays, and tuples of what is no array."""
        with _named(self._folder), self.store.arrow.open_input_file(self._path(start)) as source:
            file = pq.ParquetFile(source, pre_buffer=True)
            shapes = json.loads((file.schema_arrow.metadata or {})[b"shapes"])
            table = file.read(columns=list(names))
            return {
                name: _array(table[name], _ARRAYS[name], shapes[name])
                if name in _ARRAYS
                else tuple(table[name].to_pylist())
                for name in names
            }

    def _column(self, name: str) -> pa.Table:
        with _named(self._folder):
            paths = [self._path(start) for start in self.starts]
            files = pyarrow.dataset.dataset(paths, filesystem=self.store.arrow, format="parquet")
            return files.to_table(columns=[name])

    @property
    def _folder(self) -> str:
        return self.store.path(self.folder)

    def _path(self, start: int) -> str:
        return self.store.path(self.folder, _name(start))


Pictures = Images | StoredImages  # of one system: in memory, or not


def array_of(images: Pictures, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows `start` to `stop` (None: the last) of "latents", "pictures" or "features". Of stored
    ones the files of these rows are read, and of each that column alone."""
    if isinstance(images, Images):
        return getattr(images, name)[start:stop]
    return images.array(name, start, stop)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Name the folder whose files are not what they should be."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:  # pyarrow's are among them
        raise ValueError(f"{path} does not hold evaluation pictures: {error!r}") from error


def _name(start: int) -> str:
    return f"{start:08d}{_SUFFIX}"


def _raw_rows(array: np.ndarray) -> pa.Array:
    """(N,…) → N byte strings. (List-encoded tensors read many times slower from Parquet.)"""
    rows = np.ascontiguousarray(array)
    return pa.array([row.tobytes() for row in rows], pa.binary(rows[0].nbytes))


def _array(column: pa.ChunkedArray, dtype: Any, shape: Sequence[int]) -> np.ndarray:
    """(N,*shape), read-only; nothing is copied."""
    if not pa.types.is_fixed_size_binary(column.type):
        raise TypeError(f"a column of {column.type}")
    rows = column.combine_chunks()
    width = column.type.byte_width
    data = memoryview(rows.buffers()[1])[rows.offset * width :][: len(rows) * width]
    return np.frombuffer(data, dtype).reshape(-1, *shape)
