"""Which device a worker computes on, and how one that is lost is told from other errors."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# What the drivers of NVIDIA and AMD leave in a machine or container that has such a GPU.
_DRIVER_NODES = ("/dev/nvidiactl", "/dev/kfd")
# After these every later call of the process fails too, whatever its rows.
_DEVICE_TEXTS = (
    "CUDA error",
    "CUDA unknown error",
    "CUDA driver initialization failed",
    "No CUDA GPUs are available",
    "HIP error",
    "device-side assert",
    "illegal memory access",
    "unspecified launch failure",
    "STATUS_EXECUTION_FAILED",
)


class DeviceError(RuntimeError):
    """A worker's GPU cannot be used. The same work may succeed on another one."""

    transient = True


def worker_device(gpus: float) -> str:
    """ "cuda" for a worker with a share of GPUs, else "cpu". Raises `DeviceError`.

    Where a machine has no GPU at all, shares of them are Ray's bookkeeping (tests, a laptop) and
    the worker computes on the CPU. Where it has one that torch cannot use, doing so would take a
    hundred times as long and nobody would see why.
    """
    if not gpus:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    found = [node for node in _DRIVER_NODES if Path(node).exists()]
    if found:
        raise DeviceError(
            f"{socket.gethostname()} has a GPU ({found[0]}) that torch {torch.__version__} cannot "
            "use; expected a torch built for it and a working driver (`dmd doctor` there says "
            "more). Mend the node or take it out of the cluster, then run the same command again"
        )
    return "cpu"


@contextmanager
def device_named() -> Iterator[None]:
    """While a worker starts: a device that fails is `DeviceError` and names the node."""
    try:
        yield
    except RuntimeError as error:
        if not is_device_fault(error):
            raise
        raise DeviceError(
            f"the GPU of {socket.gethostname()} fails before any work is done: {error}. Mend the "
            "node or take it out of the cluster, then run the same command again"
        ) from error


def is_device_fault(error: BaseException) -> bool:
    """Is the device lost to this process?"""
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _DEVICE_TEXTS)
