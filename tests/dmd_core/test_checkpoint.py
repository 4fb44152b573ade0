"""Station 7: a folder counts when its marker does, and a damaged one is an error."""

import json

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from dmd_core.checkpoint import (
    MARKER,
    Checkpoint,
    CheckpointError,
    checkpoint_path,
    committed_steps,
    load_checkpoint,
    pack_optimizer,
    prune_checkpoints,
    save_checkpoint,
    unpack_optimizer,
)

FS = LocalFileSystem(auto_mkdir=True)


def _checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"net": {"w": torch.full((3,), float(step))}}, {"note": "x"})


def test_round_trip_is_exact(tmp_path):
    weights = {"a": torch.randn(4, 4), "b": torch.randn(2).bfloat16(), "n": torch.tensor(7)}
    save_checkpoint(FS, str(tmp_path), Checkpoint(5, {"net": weights}, {"lr": {"last_epoch": 5}}))
    found = load_checkpoint(FS, str(tmp_path))
    assert found is not None and found.step == 5 and found.state["lr"] == {"last_epoch": 5}
    for key, value in weights.items():
        assert torch.equal(found.parts["net"][key], value)


def test_a_folder_without_marker_does_not_exist(tmp_path):
    assert load_checkpoint(FS, str(tmp_path)) is None
    save_checkpoint(FS, str(tmp_path), _checkpoint(1))
    save_checkpoint(FS, str(tmp_path), _checkpoint(2))
    (tmp_path / "checkpoint-00000002" / MARKER).unlink()
    found = load_checkpoint(FS, str(tmp_path))
    assert found is not None and found.step == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "marker"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path, damage):
    save_checkpoint(FS, str(tmp_path), _checkpoint(1))
    folder = tmp_path / "checkpoint-00000001"
    file = folder / "net.safetensors"
    if damage == "flip":
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(bytes(raw))
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "remove":
        file.unlink()
    else:
        (folder / MARKER).write_text('{"files"')
    with pytest.raises(CheckpointError, match=MARKER if damage == "marker" else "net.safetensors"):
        load_checkpoint(FS, str(tmp_path))


def test_a_marker_may_not_name_files_outside_its_folder(tmp_path):
    save_checkpoint(FS, str(tmp_path), _checkpoint(1))
    marker = tmp_path / "checkpoint-00000001" / MARKER
    files = json.loads(marker.read_text())["files"]
    marker.write_text(json.dumps({"files": {"../secret": files["net.safetensors"]}}))
    with pytest.raises(CheckpointError, match="outside"):
        load_checkpoint(FS, str(tmp_path))


def test_pruning_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(FS, str(tmp_path), _checkpoint(step))
    prune_checkpoints(FS, str(tmp_path), keep=2)
    assert committed_steps(FS, str(tmp_path)) == [2, 3]
    assert not (tmp_path / "checkpoint-00000001").exists()


def test_checkpoints_on_s3(s3_store):
    root = s3_store.path("run", "checkpoints")
    save_checkpoint(s3_store.fs, root, _checkpoint(3))
    save_checkpoint(s3_store.fs, root, _checkpoint(4))
    s3_store.fs.rm_file(f"{checkpoint_path(root, 4)}/{MARKER}")
    found = load_checkpoint(s3_store.fs, root)
    assert found is not None and found.step == 3


def test_optimizer_state_round_trips_bitwise():
    def trained(steps: int, resume_at: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        network = torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        for step in range(steps):
            if step == resume_at:
                packed = pack_optimizer(optimizer)
                optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
                unpack_optimizer(optimizer, packed)
            optimizer.zero_grad()
            network(torch.ones(2, 4) * step).square().sum().backward()
            optimizer.step()
        return network.weight.detach()

    assert torch.equal(trained(6), trained(6, resume_at=3))


def test_optimizer_state_of_another_network_is_refused():
    one, two = (
        torch.nn.Linear(2, 2),
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
    )
    optimizer = torch.optim.AdamW(two.parameters())
    two(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(CheckpointError, match="4 parameters, expected 2"):
        unpack_optimizer(torch.optim.AdamW(one.parameters()), pack_optimizer(optimizer))
