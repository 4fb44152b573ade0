"""What a thread that computes is given first: its torch threads, exact float32, kept memory."""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

from dmd_core.precision import exact_float32

# Parameters of glibc's mallopt(3) and their largest values: above 32 MB a block is always the
# system's, and a heap is never given back.
_M_MMAP_THRESHOLD, _LARGEST_BLOCK = -3, 32 << 20
_M_TRIM_THRESHOLD, _NEVER = -1, 2**31 - 1


def prepare_computing(threads: int | None, workers: int = 1) -> None:
    """Called in the thread that computes, for Ray sets OMP_NUM_THREADS=1 for one-CPU actors.
    `threads` None: all cores, but for those of the other ones where `workers` compute on this
    machine.

    One thread of a process has more than one: each has an OpenMP team of its own, and once all
    teams together are more threads than there are cores, each of them sleeps at every barrier,
    which took a fifth of a teacher's time on two cores. Ray Data makes an actor in one thread and
    calls it in another: the first is given 1.
    """
    torch.set_num_threads(threads or max(1, usable_cores() // workers))
    exact_float32()
    keep_freed_memory()


@cache
def keep_freed_memory() -> bool:
    """Let this process reuse what it frees, up to its largest use, instead of handing it back.

    On a CPU every activation is a block of the C library. By default glibc returns large ones to
    the system at once, and the system clears each page again at its next use: 200 MB a second, a
    tenth of a small teacher's time. False where the C library has no such setting (macOS, musl).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, _NEVER)
    return bool(kept)


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: of a container with a CPU limit that limit, rounded up."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        limit, period = quota.read_text().split()
    except (OSError, ValueError):  # no control groups of version 2
        return cores
    return cores if limit == "max" else max(1, min(cores, -(-int(limit) // int(period))))
