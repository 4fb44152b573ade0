"""Station 9: what a network says of each picture of a set, kept in parts as they are computed.

A CPU core sees some six pictures a second with Inception, so 50,000 take hours: a kill loses the
parts that were being computed, and the next run computes those.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import ray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dmd_core.files import write_atomic
from dmd_core.inception import DIMENSION, load_inception
from pipelines.bounded import map_bounded
from pipelines.device import worker_device
from pipelines.images import SamplerPool
from pipelines.storage import Store, check_writable
from pipelines.stored_images import Pictures, array_of

PART_ROWS = 500  # pictures of one call: a minute or two on a CPU core
_SUFFIX = ".safetensors"
# An actor that is lost is started again so often, and what it was at is tried again so often.
_RESTARTS, _RETRIES = 10, 3

Parts = dict[int, np.ndarray]  # first row → features of its rows
Progress = Callable[[int, int], None]  # (done, total)
Network = Callable[[Pictures], np.ndarray]  # pictures → (N,…), a row for each


def inception_features(
    weights: str,
    pictures: Pictures,
    pool: SamplerPool,
    *,
    store: Store,
    folder: str | None,
    instead: Store | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """(N,2048) float32 of `pictures`, by `in_parts`."""
    return in_parts(
        partial(_inception, weights, pool.gpus), pictures, pool,
        row=(DIMENSION,), store=store, folder=folder, instead=instead, on_rows=on_rows,
    )  # fmt: skip


def in_parts(
    make: Callable[[], Network],
    pictures: Pictures,
    pool: SamplerPool,
    *,
    row: tuple[int, ...],
    store: Store,
    folder: str | None,
    instead: Store | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """(N,*row) of `pictures`: what `folder` has of it is read, the rest is computed by networks
    that the pool's workers `make` (here with 0 of them) and written there. With `folder` None
    nothing is kept. `instead`: where that folder is, if `store` takes no files.

    `folder` names these very pictures and the network: of other ones only the count would be
    noticed. `on_rows(n)`: so many rows more are there.
    """
    groups = pictures.groups(PART_ROWS)
    found: Parts = {}
    target = store
    if folder is not None:
        found, target = _kept(store, instead, folder, _sizes(groups, len(pictures.prompts)), row)
    on_rows(sum(map(len, found.values())))
    missing = {start: group for start, group in groups.items() if start not in found}
    for start, features in _computed(make, missing, pool):
        if folder is not None:
            write_atomic(target.fs, _path(target, folder, start), save({"features": features}))
        found[start] = features
        on_rows(len(features))
    return np.concatenate([found[start] for start in groups])


def counted(total: int, on_progress: Progress | None) -> Callable[[int], None]:
    """For `on_rows`: tells how many rows of `total` are done."""
    done = 0

    def on_rows(rows: int) -> None:
        nonlocal done
        done += rows
        if on_progress is not None:
            on_progress(done, total)

    return on_rows


# ---------------------------------------------------------------------- what is there


def _sizes(groups: Mapping[int, Pictures], total: int) -> dict[int, int]:
    """First row → rows."""
    starts = list(groups)
    return {start: end - start for start, end in zip(starts, [*starts[1:], total], strict=True)}


def _kept(
    store: Store, instead: Store | None, folder: str, sizes: Mapping[int, int], row: tuple[int, ...]
) -> tuple[Parts, Store]:
    """The parts that are there, and where the other ones are to be written."""
    found = _read_all(store, folder, sizes, row)
    missing = {start: rows for start, rows in sizes.items() if start not in found}
    if not missing or instead is None or _takes_files(store.at(folder)):
        return found, store
    return found | _read_all(instead, folder, missing, row), instead


def _read_all(store: Store, folder: str, sizes: Mapping[int, int], row: tuple[int, ...]) -> Parts:
    def read(part: tuple[int, int]) -> np.ndarray | None:
        start, rows = part
        return _read(store, _path(store, folder, start), (rows, *row))

    parts = zip(sizes, map_bounded(read, sizes.items()), strict=True)
    return {start: features for start, features in parts if features is not None}


def _read(store: Store, path: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Kept features; None: there are none, or not those of so many pictures."""
    try:
        raw: Any = store.fs.cat_file(path)
        found = load(raw)["features"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
    return found if found.shape == shape else None


def _takes_files(store: Store) -> bool:
    try:
        check_writable(store)
    except PermissionError:
        return False
    return True


def _path(store: Store, folder: str, start: int) -> str:
    return store.path(folder, f"{start:08d}{_SUFFIX}")


# ---------------------------------------------------------------------- what is missing


def _computed(
    make: Callable[[], Network], groups: Mapping[int, Pictures], pool: SamplerPool
) -> Iterator[tuple[int, np.ndarray]]:
    """First row and features of each group, as they are finished."""
    if pool.actors and groups:
        yield from _on_actors(make, groups, pool)
        return
    worker = _Worker(make)
    for start, group in groups.items():
        yield worker.look(start, group)


class _Worker:
    """Makes its network once, and reads the pictures that it sees by itself."""

    def __init__(self, make: Callable[[], Network]) -> None:
        self._make, self._network = make, None

    def ready(self) -> None:
        """For an actor: it has a place."""

    def look(self, start: int, pictures: Pictures) -> tuple[int, np.ndarray]:
        # Here, not when it is made: an error of an actor's maker comes back without its class.
        if self._network is None:
            self._network = self._make()
        return start, self._network(pictures)


def _on_actors(
    make: Callable[[], Network], groups: Mapping[int, Pictures], pool: SamplerPool
) -> Iterator[tuple[int, np.ndarray]]:
    """Actors, not tasks: a process for each part would load the network each time, and one that is
    used again for other work would keep its device. Work goes to those that have a place; others
    may never get one."""
    maker: Any = ray.remote(
        num_cpus=pool.cpus, num_gpus=pool.gpus,
        max_restarts=_RESTARTS, max_task_retries=_RETRIES, **pool.where,
    )(_Worker)  # fmt: skip
    actors = [maker.remote(make) for _ in range(min(pool.actors, len(groups)))]
    busy = {actor.ready.remote(): actor for actor in actors}
    waiting, left = deque(groups.items()), len(groups)
    try:
        while left:
            [finished], _ = ray.wait(list(busy))
            actor, found = busy.pop(finished), ray.get(finished)
            if waiting:
                busy[actor.look.remote(*waiting.popleft())] = actor
            else:  # its place may be what one that was lost waits for
                ray.kill(actor)
            if found is not None:
                left -= 1
                yield found[0], found[1].copy()  # out of the object store
    finally:
        for actor in actors:
            ray.kill(actor)


def _inception(weights: str, gpus: float) -> Network:
    network = load_inception(weights, device=worker_device(gpus))

    def features(images: Pictures) -> np.ndarray:
        """Equal pictures (the mean picture, N times) are seen once."""
        pictures = array_of(images, "pictures")
        distinct: dict[bytes, int] = {}
        index = [distinct.setdefault(picture.tobytes(), len(distinct)) for picture in pictures]
        once = pictures[np.unique(np.array(index), return_index=True)[1]]
        return network(once)[index]

    return features
