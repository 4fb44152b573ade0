"""Ray Data's ledger of one generation: the ids of the rows whose files are finished.

Ray names the entry of one write `<base>.parquet`, before the data is there
`<base>.pending.parquet`, and the data files `<base>-0.parquet`, `<base>-1.parquet`, …. The ledger
only saves work; what a version holds is decided when it is sealed.
"""

import re
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.bounded import map_bounded
from pipelines.commits import StoreError, delete_if_there, list_files
from pipelines.lease import Lease
from pipelines.storage import Store, no_answer

_PENDING = ".pending.parquet"
_FENCED = re.compile(r"(\d{6,})[_.-]")
_READERS = 16  # small files: the store's response time counts, not its bandwidth


def data_base(name: str) -> str:
    """The base of a data file's name."""
    return name.rsplit("-", 1)[0]


def ledger_base(name: str) -> str:
    """The base of an entry's name, pending or not."""
    return name.removesuffix(".parquet").removesuffix(".pending")


def fence_of(name: str) -> int:
    """The fence of the writer of a generation's file; 0 where the name has none."""
    match = _FENCED.match(name)
    return int(match[1]) if match else 0


def finished_ids(root: Store, generation: str, *, without: Collection[str] = ()) -> np.ndarray:
    """The ids in all entries that are not pending, int64; `without` those of these names."""
    names = [name for name in _finished(root, generation) if name not in without]
    found = list(_listed(root, generation, names))
    return np.concatenate(found) if found else np.empty(0, np.int64)


def settle_ledger(root: Store, generation: str) -> None:
    """Finish renamings that were cut in half: on an object store a move is a copy and a deletion.

    Ray deletes the data of every pending entry when it starts. An entry that is committed as well
    vouches for data that a version may name.
    """
    names = set(_entries(root, generation))
    for name in names:
        if _is_pending(name) and f"{ledger_base(name)}.parquet" in names:
            delete_if_there(root, root.path(generation, "ledger", name))


def drop_unfinished(root: Store, generation: str) -> None:
    """Remove what writes that never finished left: their data first, as Ray does when it starts.
    For the holder of the lease, where Ray has nothing to do."""
    names = [name for name in _entries(root, generation) if _is_pending(name)]
    unfinished = {ledger_base(name) for name in names}
    for name in list_files(root, root.path(generation, "data")) if unfinished else ():
        if data_base(name) in unfinished:
            delete_if_there(root, root.path(generation, "data", name))
    for name in names:
        delete_if_there(root, root.path(generation, "ledger", name))


def lost_entries(root: Store, generation: str, lost: Collection[str] = ()) -> list[str]:
    """Names of the entries whose data file is gone. `lost`: names of data files known to be gone,
    though others of the same write may still be there."""
    present = {data_base(name) for name in list_files(root, root.path(generation, "data"))}
    present -= set(map(data_base, lost))
    return [name for name in _finished(root, generation) if ledger_base(name) not in present]


def forget_lost_files(root: Store, generation: str, lost: Collection[str] = ()) -> list[str]:
    """Remove the `lost_entries`, so that their rows are made again; returns their names."""
    return _forget(root, generation, lost_entries(root, generation, lost))


def forget_unstored(root: Store, generation: str, ids: np.ndarray, lease: Lease) -> list[str]:
    """Remove the entries that list one of `ids`, which no data file holds, and the `lost_entries`;
    returns their names. When a node dies between an entry and its report, Ray writes the block
    anew under the entry that is there: what is rejected this time is listed all the same.

    What `ids` says may be old: another writer may have made those rows since. Raises
    `LeaseLostError`."""
    names = _finished(root, generation)
    listed = zip(names, _listed(root, generation, names), strict=True)
    wrong = {name for name, found in listed if np.isin(ids, found).any()}
    lease.check()
    return _forget(root, generation, sorted(wrong.union(lost_entries(root, generation))))


def _forget(root: Store, generation: str, names: list[str]) -> list[str]:
    for name in names:
        delete_if_there(root, root.path(generation, "ledger", name))
    return names


def _entries(root: Store, generation: str) -> Iterable[str]:
    return list_files(root, root.path(generation, "ledger"))


def _finished(root: Store, generation: str) -> list[str]:
    return [name for name in _entries(root, generation) if not _is_pending(name)]


def _listed(root: Store, generation: str, names: Iterable[str]) -> Iterator[np.ndarray]:
    """The ids in each of the entries."""
    paths = [root.path(generation, "ledger", name) for name in names]
    return map_bounded(lambda path: _ids(root, path), paths, _READERS)


def _is_pending(name: str) -> bool:
    return name.endswith(_PENDING)


def _ids(root: Store, path: str) -> np.ndarray:
    try:
        with root.fs.open(path, "rb") as stream:
            return pq.ParquetFile(stream).read(columns=["pair_id"])["pair_id"].to_numpy()
    except (pa.ArrowException, OSError) as error:
        torn = not isinstance(error, PermissionError) and not no_answer(error)
        way = "; move it away and run again, and its rows will be made anew" if torn else ""
        raise StoreError(f"{path}: cannot be read: {error}{way}") from error
