"""The pair factory: from a prompt list and a teacher to the next sealed version of a data set.

    nothing to do?  →  lease  →  landing  →  generating  →  sealing  →  collecting

Whatever a kill leaves behind is whole or ignored, and the same call again goes on from there.
"""

import tempfile
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.collect import Collected, collect_garbage, needs_collecting
from pipelines.config import PairsSection, StorageSection
from pipelines.landed import landed_ids_of, table_ids
from pipelines.lease import Lease, hold_lease
from pipelines.ledger import (
    drop_unfinished,
    finished_ids,
    forget_lost_files,
    forget_unstored,
    lost_entries,
    settle_ledger,
)
from pipelines.manifest import find_sealed, latest_manifest, latest_of, void_next_number
from pipelines.manifest_model import Manifest
from pipelines.pairs import Fingerprint, library_versions
from pipelines.prompts import (
    LandedPrompts,
    PreparedPrompts,
    PromptSource,
    find_landed,
    land_prompts,
    prepare_prompts,
)
from pipelines.run_record import Cost, RunRecord, generation_cost
from pipelines.seal import MissingRowsError, SealError, data_keys, seal_generation
from pipelines.storage import Store, open_store
from pipelines.stored_rows import version_ids
from pipelines.version_diff import changed_fields
from pipelines.version_files import data_folder, file_faults, file_name, list_sizes

# With nothing to make, so many files are sealed in this process; more of them on the cluster.
_SEALED_HERE = 512

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
    """What is asked for now. `settings` (name → then and now) and `added` and `removed` rows are
    against the newest version, or None and 0 if there is none; `to_make` of the `rows` are not
    stored yet, `sizes` says how many of which (height, width) in pixels, (None, None) for rows of
    the recipe's size; `lost` files of the generation's newest version are gone."""

    settings: dict[str, tuple[Any, Any]] | None
    added: int
    removed: int
    rows: int
    sizes: dict[tuple[int | None, int | None], int]
    lost: int = 0

    @property
    def to_make(self) -> int:
        return sum(self.sizes.values())


@dataclass(frozen=True)
class Outcome:
    """`made`: something was done. `cost`: what the teachers did in this run (see `RunRecord`),
    empty if they did nothing; `cost_so_far`: in all runs of the generation."""

    manifest: Manifest
    made: bool
    cost_so_far: Cost
    cost: dict[str, Any] = field(default_factory=dict)
    collected: Collected | None = None


def fill_order(
    order: PairOrder,
    watch: Watch,
    *,
    purpose: str,
    keep: int | None = None,
    on_changes: Callable[[Changes], None] = lambda changes: None,
    on_lost: Callable[[], None] | None = None,
) -> Outcome:
    """Make what is missing and seal it; with `keep`, collect what no kept version needs.

    Nothing is started and no lease is taken when there is nothing to do. `on_changes` is told what
    is new before work starts. Raises `LeaseHeldError` while another writer is at it, and
    `SealError` for a file of the newest version that has another size; one that is gone is made
    anew.
    """
    section, root, fingerprint = order.section, order.root, order.fingerprint
    with tempfile.TemporaryDirectory(prefix="dmd-prompts-") as folder:
        landing = _Landing(order, folder)
        sealed = find_sealed(root, fingerprint.digest, landing.digest)
        if sealed is not None and landing.is_there and not _lost_files(root, sealed):
            if keep is None or not needs_collecting(root, keep):
                return Outcome(sealed, False, generation_cost(root, fingerprint.folder))
        record = RunRecord(root, fingerprint.folder, gpus_per_actor=section.gpus_per_actor)
        with hold_lease(
            root,
            period_s=section.lease_seconds,
            purpose=purpose,
            progress=record.progress,
            on_lost=on_lost,
            void_next=void_next_number,
        ) as lease:
            earlier = generation_cost(root, fingerprint.folder)
            lost = _lost_files(root, latest_of(root, fingerprint.digest))
            manifest = find_sealed(root, fingerprint.digest, landing.digest)
            prompts = landing.publish()
            if manifest is None or lost:
                settle_ledger(root, fingerprint.folder)
                forget_lost_files(root, fingerprint.folder, lost)
                changes = find_changes(order, root, prompts, lost=len(lost))
                on_changes(changes)
                manifest = None
                if not changes.to_make and len(data_keys(root, fingerprint)) <= _SEALED_HERE:
                    record.phase = "sealing"
                    manifest = _sealed_here(order, prompts, lease)
                    if manifest is None:
                        changes = find_changes(order, root, prompts)
                        on_changes(changes)
                if manifest is None:
                    manifest = _make(order, prompts, changes.to_make, lease, record, earlier, watch)
            garbage = None
            if keep is not None:
                record.phase = "collecting"
                garbage = collect_garbage(root, lease, keep=keep)
    return Outcome(manifest, True, earlier.plus(record.spent), record.spent, garbage)


def _lost_files(root: Store, manifest: Manifest | None) -> tuple[str, ...]:
    """Names of the version's data files that are gone, by one listing.

    Raises `SealError` for one that has another size: while it lies there, its rows count as stored.
    """
    if manifest is None:
        return ()
    faults = file_faults(manifest, list_sizes(root, data_folder(manifest)))
    if faults.resized:
        file, size = faults.resized[0]
        others = [root.path(other.key) for other, _ in faults.resized[1:]]
        raise SealError(
            f"{root.path(file.key)} is not what version {manifest.version} was sealed with "
            f"({size} bytes, not {file.bytes}); move it away and run again, and its rows will be "
            "made anew" + (f". So are {len(others)} more: {', '.join(others)}" if others else "")
        )
    return tuple(map(file_name, faults.missing))


class _Landing:
    """The prompt table: landed already, or prepared in a local folder and published when the lease
    is held (a collector removes tables that no version names)."""

    def __init__(self, order: PairOrder, folder: str) -> None:
        self._order, self._folder = order, folder
        self._landed = self._find()
        self._prepared = None if self._landed else self._prepare()

    @property
    def is_there(self) -> bool:
        """Was the table landed from these files already, and is it still there?"""
        return self._landed is not None

    @property
    def digest(self) -> str:
        found = self._landed or self._prepared
        assert found is not None
        return found.digest

    def publish(self) -> LandedPrompts:
        if self._prepared is None:  # landed when we looked; since then it may have been collected
            landed = self._find(whole=True)
            if landed is not None:
                return landed
        return (self._prepared or self._prepare()).publish(self._order.root)

    def _find(self, *, whole: bool = False) -> LandedPrompts | None:
        order, section = self._order, self._order.section
        return find_landed(
            order.source,
            order.storage,
            order.root,
            seed=section.seed,
            samples_per_prompt=section.samples_per_prompt,
            whole=whole,
        )

    def _prepare(self) -> PreparedPrompts:
        order = self._order
        return prepare_prompts(order.source, order.storage, self._folder, **_numbers(order.section))


def _numbers(section: PairsSection) -> dict[str, int]:
    return {"seed": section.seed, "samples_per_prompt": section.samples_per_prompt}


def order_changes(order: PairOrder) -> Changes:
    """What the order changes; nothing is written into the data set."""
    with tempfile.TemporaryDirectory(prefix="dmd-prompts-") as folder:
        local, numbers = open_store(folder), _numbers(order.section)
        prompts = land_prompts(order.source, order.storage, local, **numbers)
        lost = _lost_files(order.root, latest_of(order.root, order.fingerprint.digest))
        forgotten = lost_entries(order.root, order.fingerprint.folder, lost)
        return find_changes(order, local, prompts, lost=len(lost), without=forgotten)


def find_changes(
    order: PairOrder,
    store: Store,
    prompts: LandedPrompts,
    *,
    lost: int = 0,
    without: Collection[str] = (),
) -> Changes:
    """What the `prompts` that are landed in `store` and the order's fingerprint change. Rows of the
    ledger's entries `without` do not count as stored; `lost`: see `Changes`."""
    stored = np.unique(finished_ids(order.root, order.fingerprint.folder, without=without))
    parts = [table_ids(store, file.path) for file in prompts.files]
    sizes = {
        (file.height, file.width): len(np.setdiff1d(part, stored, assume_unique=True))
        for file, part in zip(prompts.files, parts, strict=True)
    }
    asked = np.concatenate(parts)
    newest = latest_manifest(order.root)
    if newest is None:
        return Changes(None, 0, 0, len(asked), sizes, lost)
    settings = changed_fields(newest.fingerprint, order.fingerprint.as_dict())
    then = landed_ids_of(order.root, newest)
    if then is None:  # the table was removed by hand
        then = version_ids(order.root, newest)
    added, removed = np.setdiff1d(asked, then), np.setdiff1d(then, asked)
    return Changes(settings, len(added), len(removed), len(asked), sizes, lost)


def _sealed_here(order: PairOrder, prompts: LandedPrompts, lease: Lease) -> Manifest | None:
    """The version, without Ray. None: the ledger listed rows that no file holds, and does no
    more; they are to be made."""
    root, fingerprint = order.root, order.fingerprint
    drop_unfinished(root, fingerprint.folder)
    try:
        return seal_generation(root, fingerprint, prompts, lease=lease)
    except MissingRowsError as error:
        if not forget_unstored(root, fingerprint.folder, error.ids, lease):
            raise
        return None


def _make(
    order: PairOrder,
    prompts: LandedPrompts,
    missing: int,
    lease: Lease,
    record: RunRecord,
    earlier: Cost,
    watch: Watch,
) -> Manifest:
    with watch(prompts.rows) as board:
        # Imports Ray: not for "nothing to do".
        from pipelines.generate import generate_pairs
        from pipelines.teacher_actor import TeacherTask

        stored = prompts.rows - missing
        spent = {"earlier_gpu_s": earlier.gpu_s, "earlier_cpu_s": earlier.cpu_s}
        board.set.remote(done=stored, stored=stored, **spent)
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
        record.finish(manifest.rows, manifest.rejected)
    return manifest
