"""Work in threads with bounded memory: for many files on a store that answers slowly."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_WORKERS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_bounded(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int = _WORKERS
) -> Iterator[Result]:
    """Results in the order of the items; at most `workers` + 1 of them are held at a time."""
    with ThreadPoolExecutor(max_workers=workers) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
