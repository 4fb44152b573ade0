"""Saving beside training: what is stored is what was there when `save` was called."""

import gc
import threading
import weakref

import pytest
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem

from dmd_core.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointSaver,
    committed_steps,
    load_checkpoint,
    prune_checkpoints,
)
from dmd_core.checkpoint import (
    saver as saving,
)

FS = LocalFileSystem(auto_mkdir=True)


class Disk:
    """Stands in for the writing of a file: waits for `go`, and raises what it was told to."""

    def __init__(self) -> None:
        self.go, self.error = threading.Event(), None
        self.threads: list[str] = []
        self._real = safetensors.torch.save_file

    def save_file(self, tensors, path) -> None:
        self.threads.append(threading.current_thread().name)
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        self._real(tensors, path)


@pytest.fixture
def disk(monkeypatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(safetensors.torch, "save_file", disk.save_file)
    return disk


@pytest.fixture
def saver(tmp_path):
    saver = CheckpointSaver(FS, str(tmp_path))
    yield saver
    saver.close()


def _checkpoint(step: int, weights: torch.Tensor, **state) -> Checkpoint:
    return Checkpoint(step, {"net": {"w": weights, "turned": weights.view(2, -1).t()}}, state)


def test_what_is_stored_is_what_was_there_at_the_call(tmp_path, disk, saver):
    weights, history, done = torch.arange(6.0), [1], []
    saver.save(_checkpoint(1, weights, history=history), then=lambda: done.append(1))
    weights.zero_()
    history.append(2)
    assert committed_steps(FS, str(tmp_path)) == [] and done == []
    disk.go.set()
    saver.wait()
    found = load_checkpoint(FS, str(tmp_path))
    assert found is not None and found.state["history"] == [1] and done == [1]
    assert torch.equal(found.parts["net"]["w"], torch.arange(6.0))
    assert torch.equal(found.parts["net"]["turned"], torch.arange(6.0).view(2, 3).t())
    assert all(name.startswith("checkpoint") for name in disk.threads)


def test_a_save_waits_for_the_one_before(tmp_path, disk, saver):
    saver.save(_checkpoint(1, torch.ones(4)))
    second = threading.Thread(target=saver.save, args=[_checkpoint(2, torch.ones(4))])
    second.start()
    second.join(0.2)
    assert second.is_alive()
    disk.go.set()
    second.join()
    assert committed_steps(FS, str(tmp_path))[0] == 1
    saver.wait()
    assert committed_steps(FS, str(tmp_path)) == [1, 2]


def test_a_failed_save_is_told_and_the_next_one_is_tried(tmp_path, disk, saver):
    root = str(tmp_path)
    disk.go.set()
    disk.error = OSError(28, "No space left on device")
    saver.save(_checkpoint(1, torch.ones(4)), then=lambda: pytest.fail("nothing was saved"))
    assert saver.failed() is None  # not known yet
    with pytest.raises(CheckpointError, match=r"checkpoint-00000001 was not saved.*No space"):
        saver.wait()
    assert committed_steps(FS, root) == []
    saver.save(_checkpoint(2, torch.ones(4)))
    saver.save(_checkpoint(3, torch.ones(4)))
    error = saver.failed()
    assert isinstance(error, CheckpointError) and "checkpoint-00000002" in str(error)
    assert isinstance(error.__cause__, OSError) and error.__cause__.errno == 28
    with pytest.raises(CheckpointError, match="checkpoint-00000003"):
        saver.wait()
    disk.error = None
    saver.save(_checkpoint(4, torch.ones(4)))
    saver.wait()
    assert saver.failed() is None and committed_steps(FS, root) == [4]
    saver.wait()


def test_a_failure_after_the_marker_is_told_apart(tmp_path, saver):
    def full() -> None:
        raise PermissionError("not yours")

    saver.save(_checkpoint(1, torch.ones(4)), then=full)
    with pytest.raises(CheckpointError, match="is saved, but what should follow failed: not yours"):
        saver.wait()
    assert committed_steps(FS, str(tmp_path)) == [1]


def test_a_bug_is_not_taken_for_a_failed_save(saver):
    saver.save(_checkpoint(1, torch.ones(4)), then=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saver.wait()
    with pytest.raises(ValueError, match=r"net/w is torch\.complex128"):
        saver.save(_checkpoint(2, torch.ones(4, dtype=torch.complex128)))


def test_a_failed_save_does_not_keep_its_copies(disk, saver, monkeypatch):
    copies, real = [], saving._copied

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        copy = real(tensor)
        copies.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(saving, "_copied", copied)
    disk.go.set()
    for error in (OSError("full"), None):
        disk.error = error
        saver.save(_checkpoint(1, torch.ones(4)))
        saver._settle()
        gc.collect()
        assert len(copies) >= 2 and not any(copy() is not None for copy in copies)


def test_pruning_follows_each_save(tmp_path, saver):
    root = str(tmp_path)
    for step in range(1, 5):
        saver.save(
            _checkpoint(step, torch.ones(4)),
            then=lambda: prune_checkpoints(FS, root, keep=2, also=[1]),
        )
    saver.wait()
    assert committed_steps(FS, root) == [1, 3, 4]
