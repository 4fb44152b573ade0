"""Several processes save one checkpoint, and another number of them goes on from it.

Oracle: the whole tensors as the collectives of FSDP gather them, written beside the checkpoint.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dmd_core.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointSaver,
    Tensors,
    committed_steps,
    load_checkpoint,
    pack_optimizer,
    restore_checkpoint,
    save_checkpoint,
    writer,
)

FS = LocalFileSystem(auto_mkdir=True)
STATE = {"progress": {"step": 1}, "note": "x"}


def in_world(size: int, work: Callable[[int, str], None], folder: Path) -> None:
    """Run `work(rank, folder)` in `size` processes with a default group on gloo."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not once per process
    meeting = f"file://{folder}/meeting-{work.__name__}-{size}"
    workers = [
        context.Process(target=_worker, args=(rank, size, meeting, work, str(folder)))
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 180
    for worker in workers:
        worker.join(max(0, deadline - time.monotonic()))
    codes = [worker.exitcode for worker in workers]  # None: still at it
    for worker in workers:
        worker.kill()
    assert codes == [0] * size  # what they raised is in the captured output


def _worker(rank: int, size: int, meeting: str, work: Callable, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    work(rank, folder)
    dist.barrier()
    dist.destroy_process_group()


# ---------------------------------------------------------------------- a little training state


class State:
    """A network, sharded where there is a group, with its optimizer and replicated tensors.

    Rows of its weights: 7, 3 and 1: some of 4 ranks have less than others or nothing, and no rank
    of 3 has the same rows as one of 4.
    """

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 3), nn.Linear(3, 1))
        if dist.is_initialized():
            for layer in self.network:
                fully_shard(layer)
            fully_shard(self.network)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.1)
        self.names = [name for name, _ in self.network.named_parameters()]
        table = torch.randn(4, 6)
        self.plain = {
            "half": torch.randn(3, 7).bfloat16(),
            "whole": torch.randint(-(2**40), 2**40, (5,)),
            "flag": torch.tensor([True, False]),
            "scalar": torch.randn(()),
            "nothing": torch.zeros(0, 3),
            "turned": table.t(),
            "rows": table[1:3],  # in the same memory as "turned"
            "large": torch.randn(100, 100),
        }

    def step(self) -> None:
        """One update whose gradients are the same for any number of ranks."""
        for index, parameter in enumerate(self.network.parameters()):
            gradient = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) + index
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        self.optimizer.step()

    def parts(self) -> dict[str, Tensors]:
        return {
            "net": dict(self.network.state_dict()),
            "optimizer": pack_optimizer(self.optimizer, self.names),
            "plain": self.plain,
        }


def _whole(parts: dict[str, Tensors]) -> Tensors:
    return {
        f"{part}/{name}": (each.full_tensor() if isinstance(each, DTensor) else each)
        .detach().contiguous().clone()
        for part, tensors in parts.items()
        for name, each in tensors.items()
    }  # fmt: skip


def _check_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def _restored(root: str, step: int) -> State:
    """A state of other numbers, and then of the checkpoint's."""
    state = State(seed=9)
    state.step()  # the optimizer has its state, to be read into
    found = restore_checkpoint(FS, root, step, state.parts())
    assert found == {"step": step, **STATE}
    return state


def _check_restored(root: str, folder: str) -> None:
    state = _restored(root, 1)
    _check_equal(_whole(state.parts()), safetensors.torch.load_file(f"{folder}/one.safetensors"))
    state.step()
    _check_equal(_whole(state.parts()), safetensors.torch.load_file(f"{folder}/two.safetensors"))


# ---------------------------------------------------------------------- what the processes do


def _save_everything(rank: int, folder: str) -> None:
    root = f"{folder}/checkpoints"
    state = State(seed=0)
    state.step()
    expected = _whole(state.parts())
    save_checkpoint(FS, root, Checkpoint(1, state.parts(), STATE))
    saver, done = CheckpointSaver(FS, root), []
    saver.save(Checkpoint(2, state.parts(), STATE), then=lambda: done.append(rank))
    state.step()  # while the save goes on, in place
    for _ in range(50):
        dist.all_reduce(torch.ones(1))
    saver.wait()
    assert done == ([0] if rank == 0 else [])
    assert saver.failed() is None
    after = _whole(state.parts())
    if rank == 0:
        safetensors.torch.save_file(expected, f"{folder}/one.safetensors")
        safetensors.torch.save_file(after, f"{folder}/two.safetensors")
    _check_a_failure(rank, root, saver, state)
    saver.close()
    _check_restored(root, folder)


def _check_a_failure(rank: int, root: str, saver: CheckpointSaver, state: State) -> None:
    """A full disk on rank 2: every rank hears the same, nothing is believed, the next is good."""

    def full(*_args, **_kwargs) -> None:
        raise SafetensorError("no space left on device")

    real = writer.safetensors.torch.save_file
    if rank == 2:
        writer.safetensors.torch.save_file = full
    saver.save(Checkpoint(3, state.parts(), STATE))
    with pytest.raises(CheckpointError, match="no space left") as raised:
        saver.wait()
    writer.safetensors.torch.save_file = real
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, (str(raised.value), str(saver.failed())))
    assert len(set(said)) == 1
    assert committed_steps(FS, root) == [1, 2]
    saver.save(Checkpoint(3, state.parts(), STATE))
    saver.wait()
    assert saver.failed() is None and committed_steps(FS, root) == [1, 2, 3]


def _restore_on_three(rank: int, folder: str) -> None:
    root = f"{folder}/checkpoints"
    _check_restored(root, folder)
    if rank == 0:
        _damage(Path(root, "checkpoint-00000003"))
    dist.barrier()
    with pytest.raises(CheckpointError, match="--from previous to go on from step 2"):
        _restored(root, 3)
    other = {"net": {"0.weight": torch.zeros(2 + rank, 6)}}
    with pytest.raises(CheckpointError, match="different names, sizes"):
        save_checkpoint(FS, root, Checkpoint(4, other, {}))


def _damage(folder: Path) -> None:
    """Of one rank's file only: other ranks read theirs without a complaint."""
    file = folder / "net-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))


def test_four_save_and_any_number_goes_on(tmp_path):
    in_world(4, _save_everything, tmp_path)
    root = str(tmp_path / "checkpoints")
    expected = safetensors.torch.load_file(tmp_path / "one.safetensors")
    for step in (1, 2):  # saved at once, and in the background before the next update
        found = load_checkpoint(FS, root, step)
        assert found is not None
        _check_equal(_whole(found.parts), expected)
    _check_restored(root, str(tmp_path))  # alone, into plain tensors
    in_world(3, _restore_on_three, tmp_path)


def test_replicated_tensors_are_written_once_and_by_all(tmp_path):
    in_world(2, _save_plain, tmp_path)
    folder = tmp_path / "checkpoints" / "checkpoint-00000001"
    files = sorted(folder.glob("*.safetensors"))
    kept = [set(safetensors.torch.load_file(file)) for file in files]
    assert [file.name for file in files] == ["net-00000.safetensors", "net-00001.safetensors"]
    assert kept[0] | kept[1] == set("abcd") and not kept[0] & kept[1]
    assert abs(files[0].stat().st_size - files[1].stat().st_size) < 100


def _save_plain(rank: int, folder: str) -> None:
    tensors = {name: torch.full((1000,), float(ord(name))) for name in "abcd"}
    save_checkpoint(FS, f"{folder}/checkpoints", Checkpoint(1, {"net": tensors}, {}))
