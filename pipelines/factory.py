"""The pair factory: from a prompt list and a teacher to the next sealed version of a data set.

    nothing to do?  →  lease  →  landing  →  generating  →  sealing  →  collecting

Whatever a kill leaves behind is whole or ignored, and the same call again goes on from there.
"""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.collect import Collected, collect_garbage, needs_collecting
from pipelines.config import PairsSection, StorageSection
from pipelines.inspection import landed_ids_of
from pipelines.lease import Lease, hold_lease
from pipelines.manifest import Manifest, find_sealed, latest_manifest, void_next_number
from pipelines.pairs import Fingerprint, library_versions
from pipelines.prompts import (
    LandedPrompts,
    PreparedPrompts,
    PromptSource,
    find_landed,
    land_prompts,
    prepare_prompts,
)
from pipelines.run_record import RunRecord
from pipelines.seal import landed_ids
from pipelines.storage import Store, open_store
from pipelines.stored_rows import version_ids
from pipelines.version_diff import changed_fields

# rows of the version → a context that starts Ray and yields a ProgressBoard handle
Watch = Callable[[int], AbstractContextManager[Any]]


@dataclass(frozen=True)
class PairOrder:
    """What the newest version of the data set at `root` should hold, and who makes it."""

    section: PairsSection
    source: PromptSource
    teacher_url: str
    fingerprint: Fingerprint
    storage: StorageSection
    root: Store


@dataclass(frozen=True)
class Changes:
    """What is asked for now against the newest version. `settings`: name → (then, now)."""

    settings: dict[str, tuple[Any, Any]]
    added: int
    removed: int
    rows: int

    @property
    def to_make(self) -> int:
        """Rows that the newest version does not have; more may be stored already."""
        return self.rows if self.settings else self.added


@dataclass(frozen=True)
class Outcome:
    """`made`: something was done. `cost`: what the teachers did in this run (see `RunRecord`),
    empty if they did nothing."""

    manifest: Manifest
    made: bool
    cost: dict[str, Any] = field(default_factory=dict)
    collected: Collected | None = None


def fill_order(
    order: PairOrder,
    watch: Watch,
    *,
    purpose: str,
    keep: int | None = None,
    on_changes: Callable[[Changes | None], None] = lambda changes: None,
    on_lost: Callable[[], None] | None = None,
) -> Outcome:
    """Make what is missing and seal it; with `keep`, collect what no kept version needs.

    Nothing is started and no lease is taken when there is nothing to do. `on_changes` is told what
    is new (None: there was no version yet). Raises `LeaseHeldError` while another writer is at it.
    """
    section, root, fingerprint = order.section, order.root, order.fingerprint
    with tempfile.TemporaryDirectory(prefix="dmd-prompts-") as folder:
        landing = _Landing(order, folder)
        sealed = find_sealed(root, fingerprint.digest, landing.digest)
        if sealed is not None and (keep is None or not needs_collecting(root, keep)):
            return Outcome(sealed, made=False)
        record = RunRecord(root, fingerprint.folder, gpus_per_actor=section.gpus_per_actor)
        with hold_lease(
            root,
            period_s=section.lease_seconds,
            purpose=purpose,
            progress=record.progress,
            on_lost=on_lost,
            void_next=void_next_number,
        ) as lease:
            try:
                manifest = find_sealed(root, fingerprint.digest, landing.digest)
                if manifest is None:
                    prompts = landing.publish()
                    on_changes(find_changes(order, landed_ids(root, prompts)))
                    manifest = _make(order, prompts, lease, record, watch)
                collected = None
                if keep is not None:
                    record.phase = "collecting"
                    collected = collect_garbage(root, lease, keep=keep)
            except KeyboardInterrupt:
                lease.check()  # was it the lost lease that interrupted us?
                raise
    return Outcome(manifest, True, record.spent, collected)


class _Landing:
    """The prompt table: landed already, or prepared in a local folder and published when the lease
    is held (a collector removes tables that no version names)."""

    def __init__(self, order: PairOrder, folder: str) -> None:
        self._order, self._folder = order, folder
        self._landed = find_landed(*self._source, order.root, **self._numbers)
        self._prepared = None if self._landed else self._prepare()

    @property
    def digest(self) -> str:
        found = self._landed or self._prepared
        assert found is not None
        return found.digest

    def publish(self) -> LandedPrompts:
        if self._prepared is None:  # landed when we looked; since then it may have been collected
            landed = find_landed(*self._source, self._order.root, **self._numbers)
            if landed is not None:
                return landed
        return (self._prepared or self._prepare()).publish(self._order.root)

    def _prepare(self) -> PreparedPrompts:
        return prepare_prompts(*self._source, self._folder, **self._numbers)

    @property
    def _source(self) -> tuple[PromptSource, StorageSection]:
        return self._order.source, self._order.storage

    @property
    def _numbers(self) -> dict[str, int]:
        return _numbers(self._order.section)


def _numbers(section: PairsSection) -> dict[str, int]:
    return {"seed": section.seed, "samples_per_prompt": section.samples_per_prompt}


def order_changes(order: PairOrder) -> tuple[int, Changes | None]:
    """(rows of the order, what it changes); nothing is written into the data set."""
    with tempfile.TemporaryDirectory(prefix="dmd-prompts-") as folder:
        local, numbers = open_store(folder), _numbers(order.section)
        prompts = land_prompts(order.source, order.storage, local, **numbers)
        return prompts.rows, find_changes(order, landed_ids(local, prompts))


def find_changes(order: PairOrder, asked: np.ndarray) -> Changes | None:
    """What `asked` (ids) and the order's fingerprint change; None: there is no version yet."""
    newest = latest_manifest(order.root)
    if newest is None:
        return None
    settings = changed_fields(newest.fingerprint, order.fingerprint.as_dict())
    then = landed_ids_of(order.root, newest)
    if then is None:  # the table was removed by hand
        then = version_ids(order.root, newest)
    added, removed = np.setdiff1d(asked, then), np.setdiff1d(then, asked)
    # Rows that were rejected then are to be made as well.
    retried = np.intersect1d(asked, np.array(newest.rejected_ids, dtype=np.int64))
    return Changes(settings, len(added) + len(retried), len(removed), len(asked))


def _make(
    order: PairOrder, prompts: LandedPrompts, lease: Lease, record: RunRecord, watch: Watch
) -> Manifest:
    with watch(prompts.rows) as board:
        # Imports Ray: not for "nothing to do".
        from pipelines.generate import generate_pairs, stored_rows
        from pipelines.teacher_actor import TeacherTask

        stored = min(prompts.rows, stored_rows(order.root, order.fingerprint))
        board.set.remote(done=stored, stored=stored)
        record.begin(lease.fence, prompts.rows, stored, board)

        def on_phase(phase: str) -> None:
            record.phase = phase
            board.set.remote(phase=phase)

        task = TeacherTask(
            section=order.section,
            teacher_url=order.teacher_url,
            storage=order.storage,
            root=order.root,
            fingerprint=order.fingerprint,
            provenance=library_versions(),
            board=board,
            fence=lease.fence,
        )
        manifest = generate_pairs(task, prompts, lease, on_phase=on_phase)
        record.progress()
    return manifest
