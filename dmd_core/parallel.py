"""How a network lies on the workers: whole on each (DDP), or sharded over them (FSDP2).

A sharded network is built on the meta device and filled shard by shard from the teacher's weights,
so that no worker ever holds a second whole copy of a large model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

Strategy = Literal["ddp", "fsdp"]
TeacherPlacement = Literal["replicated", "sharded", "offload"]


@dataclass(frozen=True)
class World:
    """This worker among all: gradients are averaged over `size` workers."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size} workers")


@dataclass(frozen=True)
class Parallel:
    """One choice per network. The teacher is never trained: `replicated` on each worker's device,
    `sharded` over the devices, or sharded over the workers' host memory (`offload`)."""

    generator: Strategy = "ddp"
    fake: Strategy = "ddp"
    teacher: TeacherPlacement = "replicated"
    gradient_checkpointing: bool = False


# ------------------------------------------------------------------ building


def on_meta(network: nn.Module) -> nn.Module:
    """A diffusers model of the same configuration whose tensors have no memory yet."""
    model: Any = network
    with torch.device("meta"):
        return type(model).from_config(model.config)


def shard(
    network: nn.Module,
    world: World,
    *,
    offload: bool = False,
    compute: torch.dtype = torch.float32,
) -> None:
    """Shard in place, block by block, so that one block at a time is whole in memory; the
    network's own parameters outside its blocks make one more group.

    `compute` bfloat16, for a network that is not trained and that runs under autocast alone: it is
    sent in that, also what of its shards is in float32.
    """
    # Shards are cut along the first dimension.
    cast(Any, network).to(memory_format=torch.contiguous_format)
    # Also the root's own: after a pass without gradients its weights must be shards again, for the
    # moving average and checkpoints read them.
    policy: dict[str, Any] = {"mesh": _mesh(world), "reshard_after_forward": True}
    if compute == torch.bfloat16:
        # Its inputs are left as they are: rounded to bfloat16, time 999 would be 1000.
        policy["mp_policy"] = MixedPrecisionPolicy(param_dtype=compute, cast_forward_inputs=False)
    if offload:
        policy["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    for block in _blocks(network):
        fully_shard(block, **policy)
    fully_shard(network, **policy)


def fill(network: nn.Module, device: torch.device, source: Callable[[str], torch.Tensor]) -> None:
    """Give a (sharded) network from the meta device its memory, and the whole tensors
    `source(name)`: parameters and buffers."""
    network.to_empty(device=device)
    with torch.no_grad():
        for name, target in [*network.named_parameters(), *network.named_buffers()]:
            whole = source(name).to(device)
            if isinstance(target, DTensor):
                # Every worker has the whole tensor: nothing is sent.
                whole = distribute_tensor(
                    whole, target.device_mesh, target.placements, src_data_rank=None
                )
            target.copy_(whole)


def replicate(network: nn.Module, world: World, *, unused: bool = False) -> nn.Module:
    """`network` under DDP; as it is on a lone worker. `unused`: an update may leave out some of
    its parameters."""
    if world.size == 1:
        return network
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, find_unused_parameters=unused)


# ------------------------------------------------------------------ using


@contextmanager
def accumulating(network: nn.Module, *, last: bool) -> Iterator[None]:
    """Around one of several backward passes of an update: DDP averages over workers in the last.
    A sharded network averages in each, for a whole gradient would not fit beside its shards."""
    waits = isinstance(network, DistributedDataParallel) and not last
    with cast(DistributedDataParallel, network).no_sync() if waits else nullcontext():
        yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, on every worker; others as they are. All workers call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a diffusers model: entries of its lists, and the middle block."""
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            yield from (entry for entry in child if any(True for _ in entry.parameters()))
        elif name == "mid_block":
            yield child
        elif name in ("network", "model"):  # a wrapper of ours
            yield from _blocks(child)


def _mesh(world: World) -> DeviceMesh:
    if not dist.is_initialized():
        if world.size > 1:
            raise RuntimeError("sharding over several workers needs their process group")
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(world.device.type, (world.size,))
