"""Station 7: training state ↔ a folder whose marker is written last.

A checkpoint is `checkpoint-<step>/` with safetensors parts, `state.json`, and `MANIFEST.json`
(size and sha256 of every file), written after everything else. No manifest: the folder does not
exist for us. A manifest whose files do not match is an error, never "start at step 0". No pickle.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from fsspec import AbstractFileSystem

from dmd_core.files import join, write_atomic

MARKER = "MANIFEST.json"
_NAME = re.compile(r"checkpoint-(\d+)")

Tensors = dict[str, torch.Tensor]


class CheckpointError(RuntimeError):
    """A checkpoint that exists but cannot be trusted."""


@dataclass(frozen=True)
class Checkpoint:
    """`parts`: named groups of tensors (one safetensors file each); `state`: plain JSON."""

    step: int
    parts: dict[str, Tensors]
    state: dict[str, Any]


def checkpoint_path(root: str, step: int) -> str:
    return join(root, f"checkpoint-{step:08d}")


def save_checkpoint(fs: AbstractFileSystem, root: str, checkpoint: Checkpoint) -> str:
    """Write the parts, then the marker; returns the checkpoint's path."""
    target = checkpoint_path(root, checkpoint.step)
    fs.makedirs(target, exist_ok=True)
    files: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="dmd-checkpoint-") as folder:
        for name, tensors in checkpoint.parts.items():
            whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            safetensors.torch.save_file(whole, Path(folder) / f"{name}.safetensors")
        state = {"step": checkpoint.step, **checkpoint.state}
        (Path(folder) / "state.json").write_text(json.dumps(state, indent=2))
        for path in sorted(Path(folder).iterdir()):
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            fs.put_file(str(path), join(target, path.name))
    write_atomic(fs, join(target, MARKER), json.dumps({"files": files}, indent=2).encode())
    return target


def committed_steps(fs: AbstractFileSystem, root: str) -> list[int]:
    """Steps of all checkpoints whose marker exists, oldest first."""
    fs.invalidate_cache()
    if not fs.exists(root):
        return []
    steps = []
    for entry in fs.ls(root, detail=False):
        match = _NAME.fullmatch(entry.rstrip("/").rsplit("/", 1)[-1])
        if match and fs.exists(join(checkpoint_path(root, int(match[1])), MARKER)):
            steps.append(int(match[1]))
    return sorted(steps)


def load_checkpoint(
    fs: AbstractFileSystem, root: str, step: int | None = None
) -> Checkpoint | None:
    """The checkpoint of `step` (default: the newest one), verified. None: there is none yet."""
    steps = committed_steps(fs, root)
    if step is None and not steps:
        return None
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise CheckpointError(
            f"{root} has no checkpoint of step {chosen}; it has {steps or 'none'}"
        )
    return _read(fs, checkpoint_path(root, chosen), chosen, older=[s for s in steps if s < chosen])


def read_state(fs: AbstractFileSystem, root: str, step: int) -> dict[str, Any]:
    """`state` alone of a committed checkpoint, without its tensors."""
    path = join(checkpoint_path(root, step), "state.json")
    try:
        return json.loads(fs.cat_file(path))
    except (ValueError, FileNotFoundError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def prune_checkpoints(fs: AbstractFileSystem, root: str, keep: int) -> None:
    """Keep the newest `keep`. The marker goes first, so that no half one is believed."""
    for step in committed_steps(fs, root)[:-keep]:
        path = checkpoint_path(root, step)
        fs.rm_file(join(path, MARKER))
        fs.rm(path, recursive=True)


def _read(fs: AbstractFileSystem, path: str, step: int, older: list[int]) -> Checkpoint:
    hint = (
        f"To go on from step {older[-1]} instead, move {path} away."
        if older
        else f"There is no older checkpoint; to start afresh, move {path} away."
    )
    try:
        files = json.loads(fs.cat_file(join(path, MARKER)))["files"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}/{MARKER} is not a checkpoint manifest. {hint}") from error
    parts: dict[str, Tensors] = {}
    state: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="dmd-checkpoint-") as folder:
        for name, expected in files.items():
            if "/" in name or name.startswith("."):
                raise CheckpointError(f"{path}/{MARKER} names {name!r}, outside its folder. {hint}")
            local = Path(folder) / name
            try:
                fs.get_file(join(path, name), str(local))
            except FileNotFoundError as error:
                raise CheckpointError(f"{path}/{name} is missing. {hint}") from error
            if local.stat().st_size != expected["bytes"] or _sha256(local) != expected["sha256"]:
                raise CheckpointError(
                    f"{path}/{name} does not match its checksum "
                    f"(expected {expected['bytes']} bytes, sha256 {expected['sha256'][:12]}…; "
                    f"found {local.stat().st_size} bytes). {hint}"
                )
            if name.endswith(".safetensors"):
                parts[name.removesuffix(".safetensors")] = safetensors.torch.load_file(local)
            else:
                state = json.loads(local.read_text())
    return Checkpoint(step, parts, state)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack_optimizer(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's per-parameter state as a flat dict "<index>.<key>" → tensor."""
    packed = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            packed[f"{index}.{key}"] = torch.as_tensor(value)
    return packed


def unpack_optimizer(optimizer: torch.optim.Optimizer, packed: Mapping[str, torch.Tensor]) -> None:
    """Inverse of `pack_optimizer`; hyperparameters stay those of `optimizer` (the recipe's)."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in packed.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if state and sorted(state) != list(range(count)):
        raise CheckpointError(f"optimizer state is for {len(state)} parameters, expected {count}")
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
