"""Station 5: rows of a sealed version → training batches, in an order that is ours.

Epoch e visits permutation(seed, e) of the version's rows: row groups in random order, then rows
shuffled inside windows of a few row groups, so that a batch touches few of them. Epochs follow one
another without a gap, and global batch k is a fixed slice of that endless stream, whatever the
number of workers. To resume at k is to ask for k.
"""

import hashlib
import io
from collections import OrderedDict
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dmd_core.noise import stable_seed, uniform_words
from dmd_core.types import PairBatch
from pipelines.manifest import Manifest, ManifestFile
from pipelines.pairs import PairSchemaError, check_schema, decode_pairs, fingerprint_digest
from pipelines.storage import Store

# Rows mix within a window; reading stays local to it. 8 groups of 64 rows: 16 batches of 32.
WINDOW_ROW_GROUPS = 8
# A batch may straddle two windows.
_CACHED_ROW_GROUPS = 2 * WINDOW_ROW_GROUPS


class PairFileError(RuntimeError):
    """A file of pairs that is not what the manifest says."""


def part_of_batch(global_batch: int, rank: int, world_size: int) -> range:
    """Which places of a global batch belong to `rank`: contiguous, sizes differ by one at most."""
    if not 0 <= rank < world_size <= global_batch:
        raise ValueError(
            f"rank {rank} of {world_size} workers for {global_batch} rows; "
            "expected 0 <= rank < workers <= rows"
        )
    return range(
        global_batch * rank // world_size,
        global_batch * (rank + 1) // world_size,
    )


class PairReader:
    """Random access to the training batches of one sealed version.

    `verify` compares the sha256 of each file, once, when it is first read; its size always.
    """

    def __init__(self, root: Store, manifest: Manifest, seed: int, *, verify: bool = False) -> None:
        self._root, self._manifest, self._seed, self._verify = root, manifest, seed, verify
        self._groups = [
            (file, index) for file in manifest.files for index in range(len(file.row_groups))
        ]
        kept = [rows for file in manifest.files for rows in _kept_rows(file)]
        # For each row of the version: its row group, and its place in it.
        self._group = np.repeat(np.arange(len(kept)), [len(rows) for rows in kept])
        self._place = np.concatenate(kept)
        self._verified: set[str] = set()
        self._cache: OrderedDict[int, PairBatch] = OrderedDict()
        self._epoch_order = lru_cache(maxsize=2)(self._permutation)

    def with_seed(self, seed: int) -> "PairReader":
        """The same rows in another order."""
        return PairReader(self._root, self._manifest, seed, verify=self._verify)

    def __len__(self) -> int:
        """Rows of the version, and so of an epoch."""
        return len(self._group)

    def global_rows(self, k: int, global_batch: int) -> np.ndarray:
        """The rows (indices into the version, int64) of global batch k, counted over all epochs."""
        if k < 0 or global_batch < 1:
            raise ValueError(f"batch {k} of {global_batch} rows; expected k >= 0 and rows >= 1")
        return self.rows_from(k * global_batch, global_batch)

    def rows_from(self, position: int, count: int) -> np.ndarray:
        """`count` rows of the endless stream of epochs, from `position` on."""
        stop = position + count
        parts = []
        while position < stop:
            epoch, start = divmod(position, len(self))
            count = min(stop - position, len(self) - start)
            parts.append(self._epoch_order(epoch)[start : start + count])
            position += count
        return np.concatenate(parts)

    def batch(self, k: int, global_batch: int, rank: int = 0, world_size: int = 1) -> PairBatch:
        """The part of global batch k that belongs to `rank`: contiguous, sizes within one row."""
        return self.batch_from(k * global_batch, global_batch, rank, world_size)

    def batch_from(
        self, position: int, global_batch: int, rank: int = 0, world_size: int = 1
    ) -> PairBatch:
        """The same for the global batch that starts at `position` of the stream: batches may
        change their size from stage to stage."""
        part = part_of_batch(global_batch, rank, world_size)
        return self._gather(self.rows_from(position, global_batch)[part.start : part.stop])

    def rows(self, rows: np.ndarray) -> PairBatch:
        """The given rows (indices into the version), in the given order."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        return self._gather(rows)

    # ---------------------------------------------------------------- order

    def _permutation(self, epoch: int) -> np.ndarray:
        seed = stable_seed("order", self._seed, epoch)
        # Raw Philox words, not NumPy's permutation: that stream may change between versions.
        words = uniform_words(seed, len(self._groups) + len(self))
        rank_of_group = np.empty(len(self._groups), dtype=np.int64)
        rank_of_group[np.argsort(words[: len(self._groups)], kind="stable")] = np.arange(
            len(self._groups)
        )
        window = rank_of_group[self._group] // WINDOW_ROW_GROUPS
        return np.lexsort((words[len(self._groups) :], window))

    # ---------------------------------------------------------------- reading

    def _gather(self, rows: np.ndarray) -> PairBatch:
        groups, which = np.unique(self._group[rows], return_inverse=True)
        ids, prompts = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=object)
        tensors: tuple[torch.Tensor, torch.Tensor] | None = None
        for index, group in enumerate(groups):
            source = self._row_group(int(group))
            here = np.flatnonzero(which == index)
            places = self._place[rows[here]]
            if tensors is None:
                empty = source.noise.new_empty((len(rows), *source.noise.shape[1:]))
                tensors = empty, empty.clone()
            for target, values in zip(tensors, (source.noise, source.latents), strict=True):
                target[torch.from_numpy(here)] = values[torch.from_numpy(places)]
            ids[here] = np.asarray(source.pair_ids)[places]
            prompts[here] = np.asarray(source.prompts, dtype=object)[places]
        if tensors is None:
            raise ValueError("a batch of no rows; expected at least one")
        return PairBatch(tuple(ids.tolist()), tuple(prompts), *tensors)

    def _row_group(self, group: int) -> PairBatch:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        file, index = self._groups[group]
        decoded = self._read(file, index)
        self._cache[group] = decoded
        if len(self._cache) > _CACHED_ROW_GROUPS:
            self._cache.popitem(last=False)
        return decoded

    def _read(self, file: ManifestFile, index: int) -> PairBatch:
        path = self._root.path(file.key)
        try:
            self._check_content(path, file)
            with self._root.fs.open(path, "rb") as stream:
                parquet = pq.ParquetFile(stream)
                check_schema(parquet.schema_arrow)
                digest = fingerprint_digest(parquet.schema_arrow)
                decoded = decode_pairs(parquet.read_row_group(index))
        except (pa.ArrowException, PairSchemaError, OSError) as error:
            raise PairFileError(f"{path}: cannot be read: {error}") from error
        if digest != self._manifest.fingerprint_digest:
            raise PairFileError(
                f"{path}: made by {digest[:16]}, but version {self._manifest.version} "
                f"holds {self._manifest.fingerprint_digest[:16]}"
            )
        if len(decoded) != file.row_groups[index]:
            raise PairFileError(
                f"{path}: row group {index} holds {len(decoded)} rows, "
                f"but the manifest says {file.row_groups[index]}"
            )
        return decoded

    def _check_content(self, path: str, file: ManifestFile) -> None:
        size = self._root.fs.size(path)
        if size != file.bytes:
            raise PairFileError(f"{path}: {size} bytes, but the manifest says {file.bytes}")
        if not self._verify or file.key in self._verified:
            return
        with self._root.fs.open(path, "rb") as stream:
            found = _sha256(stream)
        if found != file.sha256:
            raise PairFileError(
                f"{path}: sha256 {found[:16]}…, but the manifest says {file.sha256[:16]}…"
            )
        self._verified.add(file.key)


def _kept_rows(file: ManifestFile) -> list[np.ndarray]:
    """For each row group of the file: the places of the rows that belong to the version."""
    keep = np.ones(file.rows, dtype=bool)
    keep[[item.row for item in file.excluded]] = False
    ends = np.cumsum(file.row_groups)[:-1]
    return [np.flatnonzero(part) for part in np.split(keep, ends)]


def _sha256(stream: io.IOBase) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
