"""A kill or a failing store at any operation leaves the checkpoint before, or the new one."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from dmd_core.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoint_path,
    collect_orphans,
    committed_steps,
    discard_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from pipelines.storage import Store, open_store
from tests.faulty_store import Gate, Killed, StoreFault, Turn, disk_or_memory, every_index, gated


def _checkpoint(step: int, fill: float) -> Checkpoint:
    parts = {name: {"w": torch.full((64,), fill)} for name in ("generator", "fake")}
    return Checkpoint(step, parts, {"fill": fill})


def _save(store: Store, step: int, fill: float) -> None:
    save_checkpoint(store.fs, store.root, _checkpoint(step, fill))


def _found(store: Store, step: int | None = None) -> tuple[int, float]:
    """Step and content of what is believed; it must be of one piece."""
    found = load_checkpoint(store.fs, store.root, step)
    assert found is not None
    values = {float(v) for tensors in found.parts.values() for v in tensors["w"]}
    assert values == {found.state["fill"]}
    return found.step, found.state["fill"]


@pytest.fixture(params=["disk", "memory"])
def store(request, tmp_path) -> Store:
    return disk_or_memory(request.param, tmp_path)


def _attempts(store: Store, what, run):
    """`run(gated store)` with a fault at operation 0, 1, 2, …, each on what was saved before."""

    def attempt(gate: Gate) -> None:
        fresh = store.at(f"at-{attempt.count}")
        attempt.count += 1
        _save(fresh, 1, 1.0)
        _save(fresh, 2, 2.0)
        with gated(fresh, gate) as faulty:
            attempt.done = False
            try:
                run(faulty)
                attempt.done = True
            except CheckpointError as error:
                assert isinstance(error.__cause__, StoreFault)

    attempt.count, attempt.done = 0, False
    for _ in every_index(attempt, what):
        yield store.at(f"at-{attempt.count - 1}"), attempt.done
    assert attempt.count > 3  # operations, and the last attempt met no fault


FAULTS = ["kill", "fail before", "fail after"]


@pytest.mark.parametrize("what", FAULTS)
def test_a_new_step(store, what):
    for left, done in _attempts(store, what, lambda faulty: _save(faulty, 3, 3.0)):
        newest = _found(left)
        assert newest in ((2, 2.0), (3, 3.0))
        if what != "kill":  # a save that failed left no marker, one that did not has one
            assert newest == ((3, 3.0) if done else (2, 2.0))
        torn = checkpoint_path(left.root, 3)
        expected = [torn] if newest[0] == 2 and left.fs.exists(torn) else []
        assert collect_orphans(left.fs, left.root) == expected
        assert left.fs.exists(torn) == (newest[0] == 3)
        _save(left, 3, 4.0)
        assert _found(left) == (3, 4.0)


@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("discarded", [False, True])
def test_a_step_again(store, what, discarded):
    def run(faulty: Store) -> None:
        if discarded:
            discard_checkpoint(faulty.fs, faulty.root, 2)
        _save(faulty, 2, 3.0)

    allowed = ((2, 2.0), (1, 1.0), (2, 3.0))  # the old one, none of the two, the new one
    for left, done in _attempts(store, what, run):
        assert _found(left) in (allowed[2:] if done else allowed)
        collect_orphans(left.fs, left.root)
        _save(left, 2, 4.0)
        assert _found(left) == (2, 4.0)


@pytest.mark.parametrize("what", FAULTS)
def test_removing(store, what):
    def run(faulty: Store) -> None:
        prune_checkpoints(faulty.fs, faulty.root, keep=1)
        discard_checkpoint(faulty.fs, faulty.root, 2)
        collect_orphans(faulty.fs, faulty.root)

    for left, _ in _attempts(store, what, run):
        for step in committed_steps(left.fs, left.root):
            assert _found(left, step) == (step, float(step))
        collect_orphans(left.fs, left.root)
        kept = committed_steps(left.fs, left.root)
        assert left.fs.exists(checkpoint_path(left.root, 1)) == (1 in kept)
        assert left.fs.exists(checkpoint_path(left.root, 2))  # believed or put aside


def test_a_kill_in_the_middle_of_a_part(tmp_path, monkeypatch):
    store, real = open_store(str(tmp_path)), safetensors.torch.save_file
    _save(store, 1, 1.0)

    def torn(tensors, path) -> None:
        real(tensors, path)
        Path(path).write_bytes(Path(path).read_bytes()[:100])
        raise Killed(path)

    monkeypatch.setattr(safetensors.torch, "save_file", torn)
    with pytest.raises(Killed):
        _save(store, 2, 2.0)
    assert (tmp_path / "checkpoint-00000002" / "fake-00000.safetensors").stat().st_size == 100
    assert _found(store) == (1, 1.0)
    assert collect_orphans(store.fs, store.root) == [checkpoint_path(store.root, 2)]


@pytest.mark.parametrize("how", ["again", "prune"])
def test_a_kill_in_the_middle_of_removing_a_folder(store, monkeypatch, how):
    """Of its files the one that goes first is not the marker."""
    for step in (1, 2, 3):
        _save(store, step, float(step))

    def half(path: str, recursive: bool = False) -> None:
        store.fs.rm_file(f"{path}/fake-00000.safetensors")
        raise Killed(path)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(store.fs, "rm", half)
        if how == "again":
            _save(store, 3, 4.0)
        else:
            prune_checkpoints(store.fs, store.root, keep=1)
    for step in committed_steps(store.fs, store.root):
        assert _found(store, step) == (step, float(step))
    gone = checkpoint_path(store.root, 3 if how == "again" else 1)
    assert collect_orphans(store.fs, store.root) == [gone]


def test_a_lost_reply_to_the_marker_is_a_saved_checkpoint(s3_store):
    """The store did what it was asked and said that it failed."""
    clean = Gate()
    with gated(s3_store, clean) as counted:
        _save(counted, 1, 1.0)
    last = max(i for i, (_, path) in enumerate(clean.operations) if path.endswith("MANIFEST.json"))
    gate = Gate({last: Turn("fail after")})
    with gated(s3_store.at("again"), gate) as faulty:
        _save(faulty, 1, 1.0)
    assert gate.hits == [last] and _found(s3_store.at("again")) == (1, 1.0)


def test_files_are_on_the_disk_before_the_marker(tmp_path):
    """Every file is flushed, then the folder with their names, then comes the marker."""
    gate, store = Gate(), open_store(str(tmp_path))
    with gated(store, gate) as counted:
        _save(counted, 1, 1.0)
    folder = checkpoint_path(store.root, 1)
    steps = [(name, path.removeprefix(folder)) for name, path in gate.operations]
    marker = next(i for i, (name, path) in enumerate(steps)
                  if name == "replace" and path.startswith("/MANIFEST"))  # fmt: skip
    flushed = [path for name, path in steps[:marker] if name == "fsync"]
    for file in ("/generator-00000.safetensors", "/fake-00000.safetensors"):
        assert flushed.index(file) < len(flushed) - 1 - flushed[::-1].index("")
    assert sum(path.startswith(("/state.json", "/index.json")) for path in flushed) == 2
    assert ("fsync", "") in steps[marker + 1 :]
