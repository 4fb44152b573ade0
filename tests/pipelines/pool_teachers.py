"""In place of teachers: actors that note where they work, and wait until others do or are gone."""

import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import ray

from pipelines.rejects import RejectedRow, write_rejects
from tests.pipelines.made_pairs import made_table

_PATIENCE_S = 60


@dataclass(frozen=True)
class Note:
    """One block: the process that worked on it, and whether the other process of the pool was seen
    to end meanwhile."""

    pid: int
    alone: bool = False


class NotingTeacher:
    """Notes its blocks in the folder `teacher_url`. Each waits in its first block until two work,
    the one with the last of `BLOCKS` until the other is gone."""

    BLOCKS = 6

    def __init__(self, task) -> None:
        _check_reserved(task)
        self._task, self._folder = task, Path(task.teacher_url)

    def __call__(self, rows: pa.Table) -> pa.Table:
        _write(self._folder, Note(os.getpid()))
        _wait(lambda: len(_pids(self._folder)) > 1)
        if self._is_last():
            others = _pids(self._folder) - {os.getpid()}
            alone = _wait(lambda: not any(map(psutil.pid_exists, others)))
            _write(self._folder, Note(os.getpid(), alone))
        return made_table(rows["pair_id"].to_pylist(), self._task.fingerprint)

    def _is_last(self) -> bool:
        return len(read_notes(self._folder)) == self.BLOCKS and _first(self._folder / "last")


class TellingTeacher:
    """Tells the board of `BUSY_S` seconds for each block; rejects the prompt "refused"."""

    BUSY_S = 4.0

    def __init__(self, task) -> None:
        _check_reserved(task)
        self._task = task

    def __call__(self, rows: pa.Table) -> pa.Table:
        time.sleep(0.5)  # lines of a log come between
        both = zip(rows["pair_id"].to_pylist(), rows["prompt"].to_pylist(), strict=True)
        kept, task = [], self._task
        for pair_id, prompt in both:
            if prompt != "refused":
                kept.append(pair_id)
                continue
            row = RejectedRow(pair_id, prompt, "a reason", 1)
            write_rejects(task.root, task.fingerprint.folder, [row], fence=task.fence)
        rejected = len(rows) - len(kept)
        ray.get(task.board.advance.remote(len(rows), rejected=rejected, busy_s=self.BUSY_S))
        return made_table(kept, task.fingerprint)


def _check_reserved(task) -> None:
    """So many CPUs as the settings say, and none for 0."""
    reserved = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    assert reserved == task.section.cpus_per_actor, f"Ray has reserved {reserved} CPUs"


def read_notes(folder: Path) -> list[Note]:
    return [Note(**json.loads(path.read_text())) for path in folder.glob("*.json")]


def _write(folder: Path, note: Note) -> None:
    name = uuid.uuid4().hex
    (folder / f"{name}.part").write_text(json.dumps(asdict(note)))
    os.rename(folder / f"{name}.part", folder / f"{name}.json")


def _pids(folder: Path) -> set[int]:
    return {note.pid for note in read_notes(folder)}


def _first(path: Path) -> bool:
    """Is this process the first to ask?"""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _wait(until: Callable[[], bool]) -> bool:
    end = time.monotonic() + _PATIENCE_S
    while not (there := until()) and time.monotonic() < end:
        time.sleep(0.02)
    return there
