"""Station 5: rows of a sealed version → training batches, in an order that is ours.

Global batch k is a fixed slice of the version's endless stream of epochs (`pipelines.pair_order`),
whatever the number of workers. To resume at k is to ask for k.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dmd_core.types import PairBatch
from pipelines.manifest_model import Manifest, ManifestFile
from pipelines.pair_files import Layout, PairFileError, PairFiles, kept_mask
from pipelines.pair_order import RowOrder, part_of_batch
from pipelines.pairs import TENSORS, tensor_values
from pipelines.storage import Store

__all__ = ["PairFileError", "PairPrompts", "PairReader", "part_of_batch"]

_CACHED_WINDOWS = 2  # a batch may straddle two
_PAIR = ("pair_id", "prompt", "noise", "latent")
# Of rows in their order: a tensor is a flat view of what Arrow holds, not to be written to.
_Columns = dict[str, list[Any]]


class PairReader:
    """Random access to the training batches of one sealed version.

    A window of rows is read whole; a batch is copied out of it, each tensor once. `verify` compares
    the sha256 of each file, once, when it is first read; its size always.
    """

    def __init__(self, root: Store, manifest: Manifest, seed: int, *, verify: bool = False) -> None:
        self._files = PairFiles(root, manifest, verify=verify)
        self._rows = _Rows(self._files, manifest.files)
        self._order = RowOrder(self._rows.counts, seed)
        self._window = lru_cache(maxsize=_CACHED_WINDOWS)(self._read_window)

    def __len__(self) -> int:
        """Rows of the version, and so of an epoch."""
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C,h,w) of the stored tensors."""
        return self._files.layout().shape

    def prompts(self, seed: int) -> "PairPrompts":
        """The prompts alone, in another order."""
        return PairPrompts(self._rows, seed)

    def global_rows(self, k: int, global_batch: int) -> np.ndarray:
        """The rows (indices into the version, int64) of global batch k, counted over all epochs."""
        if k < 0 or global_batch < 1:
            raise ValueError(f"batch {k} of {global_batch} rows; expected k >= 0 and rows >= 1")
        return self._order.rows_from(k * global_batch, global_batch)

    def batch(self, k: int, global_batch: int, rank: int = 0, world_size: int = 1) -> PairBatch:
        """The part of global batch k that belongs to `rank`: contiguous, sizes within one row."""
        return self.batch_from(k * global_batch, global_batch, rank, world_size)

    def batch_from(
        self, position: int, global_batch: int, rank: int = 0, world_size: int = 1
    ) -> PairBatch:
        """The same for the global batch that starts at `position` of the stream: batches may
        change their size from stage to stage."""
        part = part_of_batch(global_batch, rank, world_size)
        pieces = self._order.pieces(position + part.start, len(part))
        return _joined(
            [_pairs(self._window(p.window), p.start, p.stop, self._files.layout()) for p in pieces]
        )

    def rows(self, rows: np.ndarray) -> PairBatch:
        """The given rows (indices into the version), in the given order."""
        if not len(rows):
            raise ValueError("a batch of no rows; expected at least one")
        if not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        return _pairs(self._rows.read(rows, _PAIR), 0, len(rows), self._files.layout())

    def _read_window(self, window: tuple[int, int]) -> _Columns:
        return self._rows.read(self._order.window_rows(window), _PAIR)


class PairPrompts:
    """The prompts of a version's pairs, in seeded order; what else a pair holds is not read."""

    def __init__(self, rows: "_Rows", seed: int) -> None:
        self._rows, self._order = rows, RowOrder(rows.counts, seed)
        self._window = lru_cache(maxsize=_CACHED_WINDOWS)(self._read_window)

    def batch_from(
        self, position: int, global_batch: int, rank: int = 0, world_size: int = 1
    ) -> tuple[str, ...]:
        part = part_of_batch(global_batch, rank, world_size)
        pieces = self._order.pieces(position + part.start, len(part))
        texts = [self._window(p.window)[p.start : p.stop] for p in pieces]
        return tuple(prompt for part in texts for prompt in part)

    def _read_window(self, window: tuple[int, int]) -> list[str]:
        return self._rows.read(self._order.window_rows(window), ["prompt"])["prompt"]


class _Rows:
    """Where each row of the version lies. `counts`: its rows in each row group of its files."""

    def __init__(self, files: PairFiles, listed: Sequence[ManifestFile]) -> None:
        self._files = files
        self._groups = [
            (n, i) for n, file in enumerate(listed) for i in range(len(file.row_groups))
        ]
        kept = [places for file in listed for places in _kept_places(file)]
        self.counts = [len(places) for places in kept]
        # For each row of the version: its row group, and its place in it.
        self._group = np.repeat(np.arange(len(kept)), self.counts)
        self._place = np.concatenate(kept)

    def __len__(self) -> int:
        return len(self._group)

    def read(self, rows: np.ndarray, columns: Sequence[str]) -> _Columns:
        """The rows (indices into the version) in the given order; each row group is read once."""
        groups, table = np.unique(self._group[rows], return_inverse=True)
        tables = self._files.read((self._groups[group] for group in groups), columns)
        starts = np.cumsum([0, *map(len, tables)])[table]
        order = (starts + self._place[rows]).tolist()
        found = {}
        for name in columns:
            values = [value for table in tables for value in self._values(name, table[name])]
            found[name] = [values[i] for i in order]
        return found

    def _values(self, name: str, column: pa.ChunkedArray) -> Iterable[Any]:
        if name not in TENSORS:
            return column.to_pylist()
        shape, dtype = self._files.layout()
        return tensor_values(column, prod(shape), dtype)


def _pairs(columns: _Columns, start: int, stop: int, layout: Layout) -> PairBatch:
    """A copy of some of them: each number is moved once."""
    ids, prompts, *tensors = (columns[name][start:stop] for name in _PAIR)
    noise, latents = (_stacked(rows, layout) for rows in tensors)
    return PairBatch(tuple(ids), tuple(prompts), noise, latents)


def _stacked(rows: Sequence[np.ndarray], layout: Layout) -> torch.Tensor:
    """Flat rows → (B,C,h,w)."""
    # Memory from torch: for more than 4 MB NumPy asks for huge pages, and a kernel that clears
    # them anew for every batch takes longer than the copy.
    stacked = torch.empty((len(rows), *layout.shape), dtype=getattr(torch, layout.dtype))
    np.concatenate(rows, out=stacked.view(-1).numpy())
    return stacked


def _joined(parts: Sequence[PairBatch]) -> PairBatch:
    if len(parts) == 1:
        return parts[0]
    return PairBatch(
        tuple(pair_id for part in parts for pair_id in part.pair_ids),
        tuple(prompt for part in parts for prompt in part.prompts),
        torch.cat([part.noise for part in parts]),
        torch.cat([part.latents for part in parts]),
    )


def _kept_places(file: ManifestFile) -> list[np.ndarray]:
    """For each row group of the file: the places of the rows that belong to the version."""
    ends = np.cumsum(file.row_groups)[:-1]
    return [np.flatnonzero(part) for part in np.split(kept_mask(file), ends)]
