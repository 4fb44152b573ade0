"""The reject lane: rows without a usable pair, each with its reason, beside the data.

A rejected row leaves the stream before anything is written. It is therefore not in the ledger of
written rows, and the next run tries it again.
"""

import json
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, cast

from dmd_core.files import write_atomic
from pipelines.commits import list_files
from pipelines.storage import Store

_FOLDER = "rejects"
_READERS = 8  # small files: the store's response time counts, not its bandwidth


class RejectFileError(RuntimeError):
    """A file of rejected rows that cannot be read."""


@dataclass(frozen=True)
class RejectedRow:
    """A row that was asked for and not made, after `attempts` solves that count for it alone."""

    pair_id: int
    prompt: str
    reason: str
    attempts: int


def write_rejects(
    root: Store, generation: str, rows: Iterable[RejectedRow], *, fence: int = 0
) -> str:
    """Write one file of rejected rows of the folder `generation`; returns its path.

    `fence` is the number of the run's lease and orders the files of different runs.
    """
    lines = [json.dumps({**asdict(row), "fence": fence}) + "\n" for row in rows]
    path = root.path(generation, _FOLDER, f"{_prefix(fence)}{uuid.uuid4().hex}.jsonl")
    write_atomic(root.fs, path, "".join(lines).encode())
    return path


def read_rejects(root: Store, generation: str, *, fence: int | None = None) -> dict[int, str]:
    """pair_id → reason of every row that a run of the generation rejected, stored since or not.

    With `fence`, of that run alone; else of all runs, and the newest one's reason counts. Raises
    `RejectFileError` that names a damaged file.
    """
    wanted = "" if fence is None else _prefix(fence)
    paths = [path for path in _files(root, generation) if _name(path).startswith(wanted)]
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        contents = pool.map(root.fs.cat_file, paths)
        reasons: dict[int, str] = {}
        for path, raw in zip(paths, contents, strict=True):
            for number, line in enumerate(cast(bytes, raw).splitlines(), start=1):
                pair_id, reason = _parsed(line, f"{path}, line {number}")
                reasons[pair_id] = reason
    return reasons


def _prefix(fence: int) -> str:
    return f"{fence:06d}-"


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _files(root: Store, generation: str) -> list[str]:
    """Paths of the generation's reject files, the oldest fence first."""
    folder = root.path(generation, _FOLDER)
    return [f"{folder}/{name}" for name in list_files(root, folder) if name.endswith(".jsonl")]


def _parsed(line: bytes, place: str) -> tuple[int, str]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise _damaged(place, str(error)) from error
    if not isinstance(row, dict):
        raise _damaged(place, f"found {line[:80]!r}")
    pair_id, reason = row.get("pair_id"), row.get("reason")
    if type(pair_id) is not int or not isinstance(reason, str):
        raise _damaged(place, f"found {line[:80]!r}")
    return pair_id, reason


def _damaged(place: str, found: str) -> RejectFileError:
    return RejectFileError(
        f'{place}: not a rejected row, expected {{"pair_id": 1, "reason": "…", …}}: {found}. '
        "Move the file away and run again; its rows are tried anew"
    )
