"""In which order training visits the rows of a version: ours, and a function of seed and position.

Epoch e visits permutation(seed, e) of the version's rows: row groups in random order, then rows
shuffled inside windows of a few row groups, so that reading stays local. Epochs follow one another
without a gap: an endless stream of rows.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dmd_core.noise import stable_seed, uniform_words

# Rows mix within a window; reading stays local to it. 8 groups of 64 rows: 16 batches of 32.
WINDOW_ROW_GROUPS = 8


class Piece(NamedTuple):
    """A stretch of the stream inside one window: its rows `start` to `stop`, counted from the
    window's own first. `window` names it, (epoch, number)."""

    window: tuple[int, int]
    start: int
    stop: int


class _Epoch(NamedTuple):
    """`groups`: the row groups in order; `words`: one for each row, in the version's own order;
    `ends`: where in the epoch each window ends."""

    groups: np.ndarray
    words: np.ndarray
    ends: np.ndarray


class RowOrder:
    """`counts`: the version's rows in each of its row groups, one after the other."""

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        self._counts, self._seed = np.asarray(counts, dtype=np.int64), seed
        self._bounds = [0, *np.cumsum(self._counts).tolist()]
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self._bounds[-1]

    def rows_from(self, position: int, count: int) -> np.ndarray:
        """`count` rows (indices into the version, int64) of the stream, from `position` on."""
        return np.concatenate(
            [self.window_rows(p.window)[p.start : p.stop] for p in self.pieces(position, count)]
        )

    def pieces(self, position: int, count: int) -> Iterator[Piece]:
        """The same stretch of the stream, cut where windows end."""
        stop = position + count
        while position < stop:
            epoch, at = divmod(position, len(self))
            ends = self._epoch(epoch).ends
            number = int(np.searchsorted(ends, at, side="right"))
            first = int(ends[number - 1]) if number else 0
            last = min(int(ends[number]), at + stop - position)
            yield Piece((epoch, number), at - first, last - first)
            position += last - at

    def window_rows(self, window: tuple[int, int]) -> np.ndarray:
        """All rows of a window, in the order of the stream."""
        epoch, number = window
        groups, words, _ = self._epoch(epoch)
        start = number * WINDOW_ROW_GROUPS
        rows = np.concatenate(
            [
                np.arange(self._bounds[group], self._bounds[group + 1])
                for group in sorted(groups[start : start + WINDOW_ROW_GROUPS].tolist())
            ]
        )
        return rows[np.argsort(words[rows], kind="stable")]

    def _shuffled(self, epoch: int) -> _Epoch:
        seed, groups = stable_seed("order", self._seed, epoch), len(self._counts)
        # Raw Philox words, not NumPy's permutation: that stream may change between versions.
        words = uniform_words(seed, groups + len(self))
        order = np.argsort(words[:groups], kind="stable")
        ends = np.cumsum(self._counts[order])
        last = np.arange(WINDOW_ROW_GROUPS - 1, groups + WINDOW_ROW_GROUPS - 1, WINDOW_ROW_GROUPS)
        return _Epoch(order, words[groups:], ends[np.minimum(last, groups - 1)])


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
