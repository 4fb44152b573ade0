"""`dmd regenerate` without Ray: pairs that follow from their ids, in place of teachers."""

import io
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import generate
from pipelines.bounded import map_bounded
from pipelines.config import PairsSection, StorageSection
from pipelines.factory import Outcome, PairOrder, fill_order
from pipelines.lease import LeaseHeldError, LeaseLostError
from pipelines.ledger import finished_ids
from pipelines.pairs import Fingerprint
from pipelines.prompts import PromptSource
from pipelines.storage import Store, open_store
from tests.pipelines.made_pairs import FINGERPRINT, made_table

SAMPLES = 2
OTHER = replace(FINGERPRINT, steps=6)


def regenerate(
    root: Store,
    prompts: str,
    fingerprint: Fingerprint,
    *,
    lease_seconds: float = 60,
    fenced: bool = False,
) -> Outcome:
    """Bring the data set up to date with the file `prompts`, and keep the newest version alone.

    `fenced`: file names begin with the fence, as they really do; else they follow from the ids.
    """
    order = order_of(root, prompts, fingerprint, lease_seconds=lease_seconds)
    with (
        patch.object(generate, "_write_missing_rows", partial(write_missing_rows, fenced=fenced)),
        patch.object(generate, "_map_on_cluster", map_bounded),
        patch("pipelines.run_record.RunRecord._read", lambda record: (0, {})),
    ):
        return fill_order(order, _no_board, purpose="a test", keep=1)


def order_of(
    root: Store, prompts: str, fingerprint: Fingerprint, *, lease_seconds: float = 60
) -> PairOrder:
    section = PairsSection(lease_seconds=lease_seconds, samples_per_prompt=SAMPLES)
    source = PromptSource((prompts,))
    return PairOrder(section, source, "nowhere", fingerprint, StorageSection(), root)


@contextmanager
def _no_board(rows: int):
    yield SimpleNamespace(set=SimpleNamespace(remote=lambda **fields: None))


def write_missing_rows(task, file, lease, *, fenced: bool) -> None:
    """Two rows a block; rows that are in the ledger are not made again."""
    ids = pq.read_table(file.path, filesystem=task.root.arrow)["pair_id"].to_pylist()
    folder = task.fingerprint.folder
    done = set(finished_ids(task.root, folder).tolist())
    prefix = f"{lease.fence:06d}_" if fenced else ""
    for start in range(0, len(ids), 2):
        rows, name = ids[start : start + 2], f"{prefix}block{ids[start]}"
        if done.isdisjoint(rows):
            data = task.root.path(folder, "data", f"{name}-0.parquet")
            entry = task.root.path(folder, "ledger", f"{name}.parquet")
            write(task.root, data, made_table(rows, task.fingerprint))
            write(task.root, entry, pa.table({"pair_id": pa.array(rows, pa.int64())}))


def write(root: Store, path: str, table: pa.Table) -> None:
    """As Ray does: straight to its name; it counts when the ledger says so."""
    content = io.BytesIO()
    pq.write_table(table, content)
    root.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    root.fs.pipe_file(path, content.getvalue())


# ---------------------------------------------------------------- named points


@dataclass(frozen=True)
class Point:
    """A call of `module`.`name` one of whose arguments holds `word`, for the `at`-th time."""

    module: str
    name: str
    word: str = ""
    at: int = 0


POINTS = {
    "take the lease": Point("pipelines.lease", "create_once", "leases/"),
    "void the next number": Point("pipelines.factory", "void_next_number"),
    "first beat": Point("pipelines.lease", "_write_json", ".beat"),
    "publish the prompt table": Point("pipelines.prompt_records", "_put"),
    "record the prompt table": Point("pipelines.prompt_records", "write_atomic", "sources/"),
    "settle the ledger": Point("pipelines.factory", "settle_ledger"),
    "first data file": Point("tests.chaos.stand_in", "write", "/data/"),
    "first ledger entry": Point("tests.chaos.stand_in", "write", "/ledger/"),
    "last ledger entry": Point("tests.chaos.stand_in", "write", "/ledger/", at=2),
    "seal": Point("pipelines.generate", "seal_generation"),
    "create the manifest": Point("pipelines.manifest", "create_once", "'rows'"),
    "the collector's intent": Point("pipelines.collect", "write_atomic", "collecting.json"),
    "mark the old generation": Point("pipelines.collect", "write_atomic", "/dropped"),
    "drop the old manifest": Point("pipelines.collect", "write_atomic", "manifests/"),
    "first ledger deletion": Point("pipelines.collect", "delete_if_there", "/ledger/"),
    "second ledger deletion": Point("pipelines.collect", "delete_if_there", "/ledger/", at=1),
    "first data deletion": Point("pipelines.collect", "delete_if_there", "/data/"),
    "second data deletion": Point("pipelines.collect", "delete_if_there", "/data/", at=1),
    "run record deletion": Point("pipelines.collect", "delete_if_there", "/runs/"),
    "mark's deletion": Point("pipelines.collect", "delete_if_there", "/dropped"),
    "old record's deletion": Point("pipelines.collect", "delete_if_there", "sources/"),
    "old table's deletion": Point("pipelines.collect", "delete_if_there", "prompts/", at=1),
    "remove the intent": Point("pipelines.collect", "delete_if_there", "collecting.json"),
    "release the lease": Point("pipelines.lease", "_write_json", ".released"),
}


def end_at(point: Point, *, after: bool, how: int = signal.SIGKILL) -> None:
    """From now on this process ends (or stops: `how`) itself right before, or after, that call."""
    module, seen = import_module(point.module), []
    call: Callable[..., Any] = getattr(module, point.name)

    def last(*arguments: Any, **named: Any) -> Any:
        here = point.word in str(arguments) and len(seen) == point.at
        if point.word in str(arguments):
            seen.append(arguments)
        # To this very thread, so that it does nothing more before the signal takes effect.
        if here and not after:
            signal.pthread_kill(threading.get_ident(), how)
        result = call(*arguments, **named)
        if here and after:
            signal.pthread_kill(threading.get_ident(), how)
        return result

    setattr(module, point.name, last)


def run_in_process(
    root: str, prompts: str, other: bool, name: str | None = None, after: bool = False
) -> None:
    """Target of a process: `regenerate`, up to the point `name` if one is given."""
    if name is not None:
        end_at(POINTS[name], after=after)
    outcome = regenerate(open_store(root), prompts, OTHER if other else FINGERPRINT)
    Path(f"{root}.made").write_text(str(outcome.made))


def freeze_in_process(
    root: str, prompts: str, other: bool, name: str | None = None, after: bool = False
) -> None:
    """The same, but it stops at the point `name`. Exit code 4: the lease was lost, or is held."""
    if name is not None:
        end_at(POINTS[name], after=after, how=signal.SIGSTOP)
    fingerprint = OTHER if other else FINGERPRINT
    try:
        regenerate(open_store(root), prompts, fingerprint, lease_seconds=1, fenced=True)
    except (LeaseLostError, LeaseHeldError) as error:
        Path(f"{root}.error").write_text(str(error))
        raise SystemExit(4) from error
