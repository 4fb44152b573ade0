"""Which checkpoints a run has, and which of them go."""

import re
from collections.abc import Collection

from fsspec import AbstractFileSystem

from dmd_core.checkpoint.folder import read_bytes, remove_folder, sync_folder
from dmd_core.checkpoint.format import DISCARDED, MARKER, CheckpointError, checkpoint_path
from dmd_core.files import join, write_atomic

_NAME = re.compile(r"checkpoint-([0-9]{8,18})")


def committed_steps(fs: AbstractFileSystem, root: str) -> list[int]:
    """Steps of all checkpoints whose marker exists, oldest first."""
    return [step for step in _folders(fs, root) if _has(fs, root, step, MARKER)]


def check_committed(fs: AbstractFileSystem, root: str, step: int) -> None:
    """Raises `CheckpointError` if there is no checkpoint of `step`."""
    if not _has(fs, root, step, MARKER):
        raise CheckpointError(
            f"{root} has no checkpoint of step {step}; it has "
            f"{', '.join(map(str, committed_steps(fs, root))) or 'none'}"
        )


def discard_checkpoint(fs: AbstractFileSystem, root: str, step: int) -> None:
    """Believe this checkpoint no longer, but keep its files: the marker gets another name."""
    path = checkpoint_path(root, step)
    if not _has(fs, root, step, MARKER) and _has(fs, root, step, DISCARDED):
        return
    check_committed(fs, root, step)
    write_atomic(fs, join(path, DISCARDED), read_bytes(fs, join(path, MARKER)))
    sync_folder(fs, path)
    fs.rm_file(join(path, MARKER))
    sync_folder(fs, path)


def prune_checkpoints(
    fs: AbstractFileSystem, root: str, keep: int, also: Collection[int] = ()
) -> None:
    """Keep the newest `keep` (at least one) and those of the steps `also`. The marker goes first,
    so that no half one is believed."""
    if keep < 1:
        raise ValueError(f"keep is {keep}, expected at least 1")
    for step in committed_steps(fs, root)[:-keep]:
        if step not in also:
            remove_folder(fs, checkpoint_path(root, step))


def collect_orphans(fs: AbstractFileSystem, root: str) -> list[str]:
    """Remove the folders that no marker belongs to, left by a kill; returns their paths. What
    `discard_checkpoint` put aside is kept. Not while a step is being written."""
    orphans = [
        checkpoint_path(root, step)
        for step in _folders(fs, root)
        if not _has(fs, root, step, MARKER) and not _has(fs, root, step, DISCARDED)
    ]
    for path in orphans:
        remove_folder(fs, path)
    return orphans


def _folders(fs: AbstractFileSystem, root: str) -> list[int]:
    fs.invalidate_cache()
    if not fs.exists(root):
        return []
    names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(root, detail=False))
    matches = [match for name in names if (match := _NAME.fullmatch(name))]
    steps = {int(match[1]) for match in matches if f"checkpoint-{int(match[1]):08d}" == match[0]}
    return sorted(steps)


def _has(fs: AbstractFileSystem, root: str, step: int, name: str) -> bool:
    return fs.exists(join(checkpoint_path(root, step), name))


def remove_checkpoint(fs: AbstractFileSystem, root: str, step: int) -> None:
    """Remove the checkpoint of `step`, marker first."""
    remove_folder(fs, checkpoint_path(root, step))
