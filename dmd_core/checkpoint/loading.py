"""Reading: a whole checkpoint in one process, or each rank's part into tensors that are there."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsspec import AbstractFileSystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from dmd_core.checkpoint.folder import MarkedFolder
from dmd_core.checkpoint.format import (
    INDEX,
    STATE,
    CheckpointError,
    Parts,
    UntrustedError,
    checkpoint_path,
    parse_index,
    parse_object,
)
from dmd_core.checkpoint.ranks import Ranks, failure_of
from dmd_core.checkpoint.reader import FolderReader
from dmd_core.checkpoint.saver import Checkpoint
from dmd_core.checkpoint.steps import check_committed, committed_steps
from dmd_core.files import join


def load_checkpoint(
    fs: AbstractFileSystem,
    root: str,
    step: int | None = None,
    only: Collection[str] | None = None,
) -> Checkpoint | None:
    """The checkpoint of `step` (default: the newest one), verified, with whole tensors on the CPU.
    None: there is none yet. This process reads alone. `only`: names of the parts to read; those
    that it lacks are left out."""
    steps = committed_steps(fs, root)
    if step is None and not steps:
        return None
    chosen = steps[-1] if step is None else step
    check_committed(fs, root, chosen)
    with _way_on(fs, root, chosen):
        folder, stored, state = _open(fs, root, chosen)
        wanted = {part: stored[part] for part in stored if only is None or part in only}
        # Before memory is set aside for what an index claims.
        folder.check_sizes({c.file for t in wanted.values() for e in t.values() for c in e.chunks})
        parts = {
            part: {name: torch.empty(t.size, dtype=t.dtype) for name, t in tensors.items()}
            for part, tensors in wanted.items()
        }
        _read_into(folder, wanted, parts, Ranks.of(None, alone=True))
    return Checkpoint(chosen, parts, state)


def restore_checkpoint(
    fs: AbstractFileSystem,
    root: str,
    step: int,
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    group: dist.ProcessGroup | None = None,
    alone: bool = False,
) -> dict[str, Any]:
    """Read the checkpoint of `step` into the tensors of `parts`; returns its state.

    Every rank of `group` (default: all) calls it with the same names; tensors may be sharded in
    another way than those that were saved. Each part must have the names, sizes and types that are
    stored; other stored parts are not read. Each rank fetches and verifies the files that it needs.
    """
    ranks = Ranks.of(group, alone)
    with _way_on(fs, root, step):
        folder, stored, state = _open_together(fs, root, step, ranks)
        for part, tensors in parts.items():
            _check_targets(folder.path, part, stored, tensors)
        _read_into(folder, {part: stored[part] for part in parts}, parts, ranks)
    return state


def stored_tensors(
    fs: AbstractFileSystem, root: str, step: int
) -> dict[str, dict[str, torch.Size]]:
    """The sizes of all tensors of a checkpoint, by part and name."""
    check_committed(fs, root, step)
    with _way_on(fs, root, step):
        _, stored, _ = _open(fs, root, step)
    return {
        part: {name: tensor.size for name, tensor in tensors.items()}
        for part, tensors in stored.items()
    }


def read_state(fs: AbstractFileSystem, root: str, step: int) -> dict[str, Any]:
    """`state` alone of a committed checkpoint, without its tensors."""
    with _way_on(fs, root, step):
        return _state(MarkedFolder.open(fs, checkpoint_path(root, step)))


def damage(fs: AbstractFileSystem, root: str, step: int) -> str:
    """What is wrong with a committed checkpoint, every file read; "": it is whole."""
    try:
        folder = MarkedFolder.open(fs, checkpoint_path(root, step))
        for name in folder.files:
            with folder.verified(name):
                pass
    except CheckpointError as error:
        return str(error)
    return ""


# ---------------------------------------------------------------------- reading, step by step


@contextmanager
def _way_on(fs: AbstractFileSystem, root: str, step: int) -> Iterator[None]:
    """Say with what cannot be trusted how to go on without it."""
    try:
        yield
    except UntrustedError as error:
        others = [other for other in committed_steps(fs, root) if other != step]
        way = (
            f"run again with --from previous to go on from step {others[-1]}"
            if others
            else f"there is no other one; to start afresh, move {checkpoint_path(root, step)} away"
        )
        raise CheckpointError(f"{error}. Checkpoint of step {step}: {way}") from error


def _open(
    fs: AbstractFileSystem, root: str, step: int
) -> tuple[MarkedFolder, Parts, dict[str, Any]]:
    folder = MarkedFolder.open(fs, checkpoint_path(root, step))
    stored = parse_index(folder.read(INDEX), join(folder.path, INDEX), folder.files)
    return folder, stored, _state(folder)


def _open_together(
    fs: AbstractFileSystem, root: str, step: int, ranks: Ranks
) -> tuple[MarkedFolder, Parts, dict[str, Any]]:
    """What the coordinator reads: the others see the same marker, and one that fails, too."""

    def read() -> tuple[dict[str, Any], Parts, dict[str, Any]]:
        check_committed(fs, root, step)
        folder, stored, state = _open(fs, root, step)
        return dict(folder.files), stored, state

    files, stored, state = ranks.share(read)
    return MarkedFolder(fs, checkpoint_path(root, step), files), stored, state


def _state(folder: MarkedFolder) -> dict[str, Any]:
    return parse_object(folder.read(STATE), join(folder.path, STATE))


def _check_targets(
    path: str, part: str, stored: Parts, tensors: Mapping[str, torch.Tensor]
) -> None:
    if part not in stored:
        raise CheckpointError(f"{path} has no part {part}; it has {', '.join(sorted(stored))}")
    odd = sorted(stored[part].keys() ^ tensors.keys())
    if odd:
        raise CheckpointError(
            f"{path}: {part} has {len(stored[part])} tensors, expected {len(tensors)}; in one of "
            f"the two only: {', '.join(odd[:5])}{', …' if len(odd) > 5 else ''}"
        )
    for name, tensor in tensors.items():
        found = stored[part][name]
        if found.size != tensor.size() or found.dtype != tensor.dtype:
            raise CheckpointError(
                f"{path}: {part}/{name} is {found.dtype} {list(found.size)}, expected "
                f"{tensor.dtype} {list(tensor.size())}"
            )


def _read_into(
    folder: MarkedFolder,
    stored: Parts,
    parts: Mapping[str, Mapping[str, torch.Tensor]],
    ranks: Ranks,
) -> None:
    reader = FolderReader(folder, stored)
    flat = {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}
    try:
        dcp.load(
            flat,
            storage_reader=reader,
            planner=DefaultLoadPlanner(flatten_state_dict=False),
            process_group=ranks.group,
            no_dist=not ranks.together,
        )
    except CheckpointException as error:
        failure = failure_of(error)
        if isinstance(failure, OSError) and reader.failure is not None:
            raise reader.failure from None
        raise failure from error
