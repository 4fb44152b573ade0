"""What a thread that computes is given: threads, float32, memory that its process keeps."""

import subprocess
import sys

import pytest
import torch

from pipelines import computing
from pipelines.computing import prepare_computing

# Sixteen activations of 8 MB, let go together, as between two passes.
PAGES_CLEARED = """
import resource, torch
from pipelines.computing import prepare_computing
prepare_computing(1)
def compute():
    blocks = [torch.ones(2 << 20) for _ in range(16)]
for _ in range(3):  # until the heap has found its size
    compute()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    compute()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_float32_of_a_worker_is_not_tf32():
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before, threads = [flag.allow_tf32 for flag in flags], torch.get_num_threads()
    try:
        for flag in flags:
            flag.allow_tf32 = True
        prepare_computing(3)
        assert torch.get_num_threads() == 3
        assert [flag.allow_tf32 for flag in flags] == [False, False]
    finally:
        torch.set_num_threads(threads)
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


@pytest.mark.parametrize(("workers", "threads"), [(1, 6), (2, 3), (4, 1), (7, 1)])
def test_workers_that_share_a_machine_share_its_cores(monkeypatch, one_thread, workers, threads):
    monkeypatch.setattr(computing, "usable_cores", lambda: 6)
    prepare_computing(None, workers)
    assert torch.get_num_threads() == threads
    prepare_computing(5, workers)  # as it was told
    assert torch.get_num_threads() == 5


@pytest.mark.parametrize(
    ("content", "cores"),
    [("max 100000\n", 8), ("400000 100000\n", 4), ("150000 100000\n", 2), ("20000 100000\n", 1),
     ("6400000 100000\n", 8), (None, 8)],
)  # fmt: skip
def test_the_limit_of_a_container_is_that_of_its_workers(tmp_path, monkeypatch, content, cores):
    monkeypatch.setattr(computing.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    quota = tmp_path / "cpu.max"
    if content:
        quota.write_text(content)
    assert computing.usable_cores(quota) == cores


@pytest.mark.skipif(not computing.keep_freed_memory(), reason="a C library without mallopt")
def test_what_computing_frees_is_not_cleared_by_the_system_again():
    command = [sys.executable, "-c", PAGES_CLEARED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 4096 < 10e6  # of 1.3 GB that were freed
