"""Station 9: Inception features of a set of pictures, kept in parts as they are computed.

A CPU core sees some four pictures a second, so 50,000 take hours: a kill loses the parts that
were being computed, and the next run computes those.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import ray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dmd_core.files import write_atomic
from dmd_core.inception import DIMENSION, load_inception
from pipelines.bounded import map_bounded
from pipelines.device import worker_device
from pipelines.images import SamplerPool
from pipelines.storage import Store
from pipelines.stored_images import Pictures

PART_ROWS = 500  # pictures of one task: a minute or two on a CPU core
_SUFFIX = ".safetensors"

Parts = dict[int, np.ndarray]  # first row → features of its rows


def inception_features(
    weights: str,
    pictures: Pictures,
    pool: SamplerPool,
    *,
    store: Store,
    folder: str | None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """(N,2048) float32 of `pictures`: what `folder` has of them is read, the rest is computed on
    the pool's workers (here with 0 of them) and written there. With `folder` None nothing is kept.

    `folder` names these very pictures: of other ones only the count would be noticed.
    `on_rows(n)`: so many rows more are there.
    """
    groups = pictures.groups(PART_ROWS)
    found = {} if folder is None else _kept(store, folder, groups, len(pictures.prompts))
    on_rows(sum(map(len, found.values())))
    missing = {start: group for start, group in groups.items() if start not in found}
    for start, features in _computed(weights, missing, pool):
        if folder is not None:
            write_atomic(store.fs, _path(store, folder, start), save({"features": features}))
        found[start] = features
        on_rows(len(features))
    return np.concatenate([found[start] for start in groups])


def _kept(store: Store, folder: str, groups: Mapping[int, Pictures], total: int) -> Parts:
    starts = list(groups)
    ends = [*starts[1:], total]

    def read(part: tuple[int, int]) -> np.ndarray | None:
        start, end = part
        return _read(store, _path(store, folder, start), end - start)

    parts = zip(starts, map_bounded(read, zip(starts, ends, strict=True)), strict=True)
    return {start: features for start, features in parts if features is not None}


def _computed(
    weights: str, groups: Mapping[int, Pictures], pool: SamplerPool
) -> Iterator[tuple[int, np.ndarray]]:
    """First row and features of each group, as they are finished. Each task reads the pictures
    that it sees by itself."""
    if not pool.actors:
        for start, group in groups.items():
            yield start, _compute(weights, group, pool.gpus)
        return
    task = ray.remote(_compute).options(num_cpus=pool.cpus, num_gpus=pool.gpus, **pool.where)
    running = {task.remote(weights, group, pool.gpus): start for start, group in groups.items()}
    while running:
        [finished], _ = ray.wait(list(running))
        yield running.pop(finished), ray.get(finished)


def _compute(weights: str, images: Pictures, gpus: float) -> np.ndarray:
    """Equal pictures (the mean picture, N times) are seen once."""
    pictures = np.concatenate([part.pictures for part in images.parts()])
    distinct: dict[bytes, int] = {}
    index = [distinct.setdefault(picture.tobytes(), len(distinct)) for picture in pictures]
    once = pictures[np.unique(np.array(index), return_index=True)[1]]
    return load_inception(weights, device=worker_device(gpus))(once)[index]


def _path(store: Store, folder: str, start: int) -> str:
    return store.path(folder, f"{start:08d}{_SUFFIX}")


def _read(store: Store, path: str, rows: int) -> np.ndarray | None:
    """Kept features; None: there are none, or not those of so many pictures."""
    try:
        found = load(store.fs.cat_file(path))["features"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
    return found if found.shape == (rows, DIMENSION) else None
