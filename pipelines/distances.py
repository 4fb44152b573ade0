"""Station 9: how far each picture is from the teacher's of the same noise.

Pictures are most of what an evaluation has stored. So each is read once, alone of its row, and by
several threads; what is in memory are a few files, whatever the number of pictures.
"""

from collections.abc import Callable, Mapping

import numpy as np

from dmd_core.metrics import pair_distances
from pipelines.bounded import map_bounded
from pipelines.stored_images import Pictures, StoredImages, array_of
from pipelines.systems import TEACHER

_THREADS = 4  # each holds a file of the teacher's pictures and one of another system's
_ROWS = 32  # of pictures that are in no files, at a time

Block = tuple[int, int]


def distances_to_teacher(
    images: Mapping[str, Pictures], on_rows: Callable[[int], None] = lambda rows: None
) -> dict[str, np.ndarray]:
    """System → the root-mean-square difference of each of its pictures to the teacher's, in pixels
    of [0, 1]: (N,) float64. `images` has the teacher's, too, which get none.

    `on_rows(n)`: so many pictures more are read.
    """
    teacher = images[TEACHER]
    others = {system: entry for system, entry in images.items() if system != TEACHER}
    found: dict[str, list[np.ndarray]] = {system: [] for system in others}

    def compare(block: Block) -> dict[str, np.ndarray]:
        theirs = array_of(teacher, "pictures", *block)
        return {
            system: _distances(array_of(entry, "pictures", *block), theirs)
            for system, entry in others.items()
        }

    blocks = _blocks(teacher)
    compared = zip(blocks, map_bounded(compare, blocks, _THREADS), strict=True)
    for (start, end), of_systems in compared:
        for system, distances in of_systems.items():
            found[system].append(distances)
        on_rows(len(images) * (end - start))
    return {system: np.concatenate(parts) for system, parts in found.items()}


def _blocks(images: Pictures) -> list[Block]:
    """First row and end of what is read together: a file."""
    total = len(images.prompts)
    starts = images.starts if isinstance(images, StoredImages) else range(0, total, _ROWS)
    return list(zip(starts, [*starts[1:], total], strict=True))


def _distances(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """One picture at a time: as floats they are eight times as large."""
    if ours.shape != theirs.shape:
        raise ValueError(f"pictures to compare are {ours.shape} and {theirs.shape}")
    pairs = zip(ours, theirs, strict=True)
    return np.concatenate([pair_distances(_scaled(a), _scaled(b)) for a, b in pairs])


def _scaled(picture: np.ndarray) -> np.ndarray:
    return picture[None].astype(np.float32) / 255
