"""The checkpoints of a training run: saved in the background, restored on any group of workers.

Which of them may be believed is decided by their markers and by the run's record of rollbacks
(`health_record`), on rank 0; every worker hears it.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch.distributed as dist

from dmd_core.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointSaver,
    collect_orphans,
    committed_steps,
    prune_checkpoints,
    read_state,
    remove_checkpoint,
    restore_checkpoint,
    stored_tensors,
)
from dmd_core.files import store_errors
from dmd_core.networks import DmdNetworks
from pipelines.health_record import HEALTH, HealthEvent, HealthRecordError, believed
from pipelines.health_rules import Verdict, last_good
from pipelines.patience import insist
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import Store
from pipelines.workers import Group

_MOST_FAILURES = 3  # saves in a row that may fail before training stops for it
_logger = logging.getLogger(__name__)


class RunCheckpoints:
    """Every worker has one, and calls the same methods at the same points of the loop.

    `keep`: the newest so many stay, and those of the committed ones that `also` names (asked on
    rank 0, in the background thread).
    """

    def __init__(
        self,
        store: Store,
        networks: DmdNetworks,
        group: Group,
        *,
        keep: int,
        also: Callable[[Sequence[int]], Collection[int]],
    ) -> None:
        self._fs, self._root = store.fs, store.path(CHECKPOINTS)
        self._networks, self._group = networks, group
        self._keep, self._also = keep, also
        # Plans and errors travel as objects: not over the group of the gradients.
        self._ranks: Any = dist.new_group(backend="gloo") if group.size > 1 else None
        self._saver = self._open()
        self._failures = 0

    def newest(self, events: Sequence[HealthEvent]) -> int | None:
        """The newest step that may be believed; what may not, and what a kill left half-written,
        is removed. None: there is none yet."""
        return self._group.first(lambda: self._trusted(events))

    def committed(self) -> list[int]:
        return committed_steps(self._fs, self._root)

    def restore(self, step: int) -> dict[str, Any]:
        """The networks' state from the checkpoint of `step`; returns the rest of it."""
        # Read once: a worker that alone cannot read it would leave the others waiting for it.
        stored = self._group.first(lambda: stored_tensors(self._fs, self._root, step))
        targets = self._networks.targets(stored)
        return restore_checkpoint(
            self._fs, self._root, step, targets, self._ranks, alone=self._ranks is None
        )

    def save(self, step: int, state: dict[str, Any], *, surely: bool = False) -> None:
        """Begin to save; the save before it is over then, for better or worse. A few failures in a
        row are warnings, for the next one may succeed; then `CheckpointError`. `surely`: wait, and
        try for some minutes: what is not stored now is lost."""
        if surely:
            return insist(lambda: self._save_now(step, state), (CheckpointError,), "the last save")
        self._begin_to_save(step, state)
        self._count_failure()

    def _save_now(self, step: int, state: dict[str, Any]) -> None:
        self._begin_to_save(step, state)
        self._saver.wait()

    def _begin_to_save(self, step: int, state: dict[str, Any]) -> None:
        self._saver.save(Checkpoint(step, self._networks.parts(), state), then=self._prune)

    def settle(self) -> None:
        """Wait for the save that is under way, whether it succeeds or not."""
        self._saver.close()
        self._count_failure()  # the next saver knows nothing of it
        self._saver = self._open()

    def goal(self, verdict: Verdict) -> int | None:
        """Where a rollback for it goes; None: nothing is left to go back to. Waits for the save
        that is under way: it may be of a step to be forgotten."""
        self.settle()
        return self._group.first(lambda: last_good(self.committed(), verdict))

    def drop_after(self, step: int) -> None:
        """Forget what was saved after `step`, a `goal`. Raises `CheckpointError`, and removes
        nothing, where `step` itself has no checkpoint."""
        self._group.first(lambda: self._remove_after(step))

    def close(self) -> None:
        """The run is over: what a failed save left goes, too."""
        self._saver.close()
        if self._group.rank == 0:
            try:
                collect_orphans(self._fs, self._root)
            except store_errors() as error:
                _logger.warning("half-written checkpoints may be left in %s: %s", self._root, error)

    def _open(self) -> CheckpointSaver:
        return CheckpointSaver(self._fs, self._root, self._ranks, alone=self._ranks is None)

    def _trusted(self, events: Sequence[HealthEvent]) -> int | None:
        collect_orphans(self._fs, self._root)
        steps = self.committed()
        counts = {s: read_state(self._fs, self._root, s).get("rollbacks", 0) for s in steps}
        trusted = believed(events, counts)
        if steps and not trusted:  # or all of them would go
            raise HealthRecordError(
                f"{HEALTH} in {self._root.removesuffix('/' + CHECKPOINTS)} lists a rollback to a "
                f"step whose checkpoint is gone; those of steps {', '.join(map(str, steps))} are "
                "from after it. Put that checkpoint back, or start again in another run.dir"
            )
        for step in set(steps) - set(trusted):
            remove_checkpoint(self._fs, self._root, step)
        return trusted[-1] if trusted else None

    def _remove_after(self, step: int) -> None:
        committed = self.committed()
        if step not in committed:
            raise CheckpointError(
                f"{self._root} has no checkpoint of step {step} to go back to; it has "
                f"{', '.join(map(str, committed)) or 'none'}"
            )
        for later in committed:
            if later > step:
                remove_checkpoint(self._fs, self._root, later)

    def _prune(self) -> None:
        """What stays too long is removed after a later save. Were this an error, that of the save,
        the checkpoint would be thought lost and, at the end, removed to be written again."""
        try:
            prune_checkpoints(self._fs, self._root, self._keep, self._also(self.committed()))
        except store_errors() as error:
            _logger.warning("old checkpoints may be left in %s: %s", self._root, error)

    def _count_failure(self) -> None:
        failed = self._saver.failed()
        self._failures = 0 if failed is None else self._failures + 1
        if failed is None:
            return
        if self._failures >= _MOST_FAILURES:
            raise failed
        if self._group.rank == 0:
            _logger.warning("%s; training goes on, the next save is tried", failed)
