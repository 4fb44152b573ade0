"""Saving, at once or in the background while training goes on."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsspec import AbstractFileSystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from dmd_core.checkpoint.format import (
    DTYPE_NAMES,
    CheckpointError,
    Tensors,
    check_part_name,
    checkpoint_path,
)
from dmd_core.checkpoint.ranks import Ranks, failure_of
from dmd_core.checkpoint.writer import FolderWriter
from dmd_core.files import store_errors

# One process alone is one of our cases, and nothing to warn of at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")


@dataclass(frozen=True)
class Checkpoint:
    """`parts`: named groups of tensors, each of them a DTensor or the same on every rank;
    `state`: plain JSON."""

    step: int
    parts: dict[str, Tensors]
    state: dict[str, Any]


@dataclass(frozen=True)
class Staged:
    """What this rank writes of a checkpoint. `tensors`: by "<part>/<name>", local ones."""

    step: int
    parts: tuple[str, ...]
    plan: SavePlan
    tensors: Tensors
    state: bytes


def save_checkpoint(
    fs: AbstractFileSystem,
    root: str,
    checkpoint: Checkpoint,
    group: dist.ProcessGroup | None = None,
    alone: bool = False,
) -> str:
    """Write the parts, then the marker; returns the checkpoint's path.

    Every rank of `group` (default: all) calls it; `alone`: this process alone. What an older
    checkpoint of this step left is removed first. Raises `CheckpointError` on every rank if one
    could not write.
    """
    ranks = Ranks.of(group, alone)
    return write(fs, root, stage(checkpoint, ranks, copy=False), ranks)


class CheckpointSaver:
    """Saves in a background thread what `save` copied to the CPU's memory.

    Every rank has one and calls the same methods in the same order; `alone`: this process is the
    only one that saves, whatever groups there are. The thread's collectives run on a gloo group of
    its own, in which no rank waits longer than `timeout` for another one's files. A save that
    failed leaves no marker, and training may go on: ask `failed` after each `save`.
    """

    def __init__(
        self,
        fs: AbstractFileSystem,
        root: str,
        group: dist.ProcessGroup | None = None,
        alone: bool = False,
        timeout: timedelta = timedelta(hours=1),
    ) -> None:
        self._fs, self._root = fs, root
        self._ranks = Ranks.apart(group, alone, timeout)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failed: CheckpointError | None = None

    def save(self, checkpoint: Checkpoint, then: Callable[[], object] | None = None) -> None:
        """Copy the tensors, and write them while the caller goes on; waits for the save before.

        `then` runs on the coordinator once the checkpoint is complete (to remove older ones).
        """
        self._settle()
        staged = stage(checkpoint, self._ranks, copy=True)
        self._pending = self._thread.submit(self._run, staged, then)

    def failed(self) -> CheckpointError | None:
        """The error of the last save that `save` or `wait` waited for, the same on every rank;
        None if that one is stored, or none was waited for yet."""
        return self._failed

    def wait(self) -> None:
        """Wait for the pending save; raises `CheckpointError` if the last one failed."""
        self._settle()
        if self._failed is not None:
            raise self._failed

    def close(self) -> None:
        """Wait for the pending save, without raising its `CheckpointError`, and end the thread."""
        self._settle()
        self._thread.shutdown()

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
            self._failed = None
        except CheckpointError as error:
            self._failed = _without_frames(error)

    def _run(self, staged: Staged, then: Callable[[], object] | None) -> None:
        path = write(self._fs, self._root, staged, self._ranks)
        try:
            self._ranks.share(then or (lambda: None))
        except (CheckpointError, *store_errors()) as error:
            raise CheckpointError(
                f"{path} is saved, but what should follow failed: {error}"
            ) from error


def stage(checkpoint: Checkpoint, ranks: Ranks, copy: bool) -> Staged:
    """This rank's share: its pieces of the sharded tensors, and of those that are the same on every
    rank about as many bytes as the others take. `copy`: into memory of the CPU that is ours."""
    tensors = {}
    for part, named in checkpoint.parts.items():
        check_part_name(part)
        tensors |= {f"{part}/{name}": tensor.detach() for name, tensor in named.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, expected one of {list(DTYPE_NAMES)}")
    ours = _share_of(tensors, ranks)
    plan = create_default_local_save_plan(ours, ranks.coordinates)
    local = {item.index.fqn: _local(ours[item.index.fqn]) for item in plan.items}
    return Staged(
        checkpoint.step,
        tuple(checkpoint.parts),
        replace(plan, planner_data=_fingerprint(tensors)),
        {name: _copied(tensor) for name, tensor in local.items()} if copy else local,
        json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=2).encode(),
    )


def write(fs: AbstractFileSystem, root: str, staged: Staged, ranks: Ranks) -> str:
    """Write what every rank staged; returns the checkpoint's path. Raises `CheckpointError` on
    every rank if one could not write; then there is no marker."""
    path = checkpoint_path(root, staged.step)
    writer = FolderWriter(fs, path, staged.parts, staged.state)
    try:
        dcp.save(
            dict(staged.tensors),
            storage_writer=writer,
            planner=_StagedPlanner(staged),
            process_group=ranks.group,
            no_dist=not ranks.together,
        )
    except CheckpointException as error:
        failure = failure_of(error)
        if not isinstance(failure, CheckpointError | OSError):
            raise failure from error
        raise CheckpointError(f"{path} was not saved: {failure}") from (writer.failure or failure)
    return path


class _StagedPlanner(DefaultSavePlanner):
    """Plans what was staged; by then the tensors themselves may have changed."""

    def __init__(self, staged: Staged) -> None:
        super().__init__(flatten_state_dict=False)
        self._staged = staged

    def create_local_plan(self) -> SavePlan:
        return self._staged.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        if len({plan.planner_data for plan in all_plans}) > 1:
            raise CheckpointError("the ranks hold tensors of different names, sizes or types")
        return super().create_global_plan(all_plans)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._staged.tensors[write_item.index.fqn]


def _share_of(tensors: Tensors, ranks: Ranks) -> Tensors:
    """Without the tensors that another rank takes: every rank gives the same answer unasked."""
    loads, ours = [0] * ranks.size, {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        if isinstance(tensors[name], DTensor):
            ours[name] = tensors[name]
            continue
        taker = loads.index(min(loads))
        loads[taker] += tensors[name].nbytes
        if taker == ranks.rank:
            ours[name] = tensors[name]
    return ours


def _fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    listed = sorted((name, str(each.dtype), tuple(each.shape)) for name, each in tensors.items())
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _without_frames(error: CheckpointError) -> CheckpointError:
    """The same error with its causes; kept as it is, it would keep all staged tensors, which are
    in the frames that it passed."""
    kept = CheckpointError(str(error))
    cause = kept.__cause__ = error.__cause__
    while cause is not None:
        cause.__traceback__ = cause.__context__ = None
        cause = cause.__cause__
    return kept
