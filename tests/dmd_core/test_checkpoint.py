"""Station 7: a folder counts when its marker does, and a damaged one is an error."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem

from dmd_core.checkpoint import (
    MARKER,
    Checkpoint,
    CheckpointError,
    checkpoint_path,
    collect_orphans,
    committed_steps,
    discard_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    restore_checkpoint,
    save_checkpoint,
    stored_tensors,
)

FS = LocalFileSystem(auto_mkdir=True)


def _checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"net": {"w": torch.full((3,), float(step))}}, {"note": "x"})


def _saved(root: Path, *steps: int) -> Path:
    """Checkpoints of these steps; the folder of the last one."""
    for step in steps:
        save_checkpoint(FS, str(root), _checkpoint(step))
    return Path(checkpoint_path(str(root), steps[-1]))


def _all_kinds() -> dict[str, torch.Tensor]:
    table = torch.randn(4, 6)
    return {
        "a": torch.randn(4, 4),
        "b": torch.randn(2).bfloat16(),
        "n": torch.tensor(7),
        "small": torch.tensor([1, -2], dtype=torch.int8),
        "flag": torch.tensor([True, False]),
        "byte/with.odd name": torch.arange(3, dtype=torch.uint8),
        "eighth": torch.randn(5).to(torch.float8_e4m3fn),
        "exact": torch.randn(2, dtype=torch.float64),
        "nothing": torch.zeros(0, 3),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "turned": table.t(),
        "row": table[1],  # in the memory of "turned"
        "same": table,
        "wide": torch.zeros(1).expand(3),
        "last": torch.randn(1, 3, 2, 2).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
        assert _bits(found[key]) == _bits(value), key


# ---------------------------------------------------------------------- round trips


def test_round_trip_is_exact(tmp_path):
    weights = _all_kinds()
    saved = Checkpoint(5, {"net": weights, "empty": {}}, {"lr": {"last_epoch": 5}})
    save_checkpoint(FS, str(tmp_path), saved)
    found = load_checkpoint(FS, str(tmp_path))
    assert found is not None and found.step == 5 and found.state["lr"] == {"last_epoch": 5}
    assert found.parts["empty"] == {}
    _check_same(found.parts["net"], weights)

    sizes = stored_tensors(FS, str(tmp_path), 5)
    assert sizes == {"net": {key: value.shape for key, value in weights.items()}, "empty": {}}
    targets = {key: torch.ones_like(value, requires_grad=False) for key, value in weights.items()}
    targets["parameter"] = torch.nn.Parameter(torch.zeros(2))  # a live weight
    targets["wide"] = torch.ones(3)
    assert restore_checkpoint(FS, str(tmp_path), 5, {"net": targets})["step"] == 5
    _check_same(targets, weights)


def test_a_part_is_a_plain_safetensors_file(tmp_path):
    folder = _saved(tmp_path, 3)
    names = {"net-00000.safetensors", "index.json", "state.json", MARKER}
    assert {path.name for path in folder.iterdir()} == names
    alone = safetensors.torch.load_file(folder / "net-00000.safetensors")
    assert torch.equal(alone["w"], torch.full((3,), 3.0))
    assert json.loads((folder / "state.json").read_text()) == {"step": 3, "note": "x"}


def test_only_the_parts_that_were_asked_for_are_read(tmp_path):
    parts = {name: {"w": torch.ones(2)} for name in ("generator", "fake")}
    save_checkpoint(FS, str(tmp_path), Checkpoint(1, parts, {}))
    (tmp_path / "checkpoint-00000001" / "fake-00000.safetensors").unlink()
    found = load_checkpoint(FS, str(tmp_path), only=["generator", "ema"])
    assert found is not None and list(found.parts) == ["generator"]
    with pytest.raises(CheckpointError, match="fake-00000"):
        load_checkpoint(FS, str(tmp_path))


@pytest.mark.parametrize(
    "targets, message",
    [
        ({"net": {"w": torch.zeros(4)}}, r"net/w is torch.float32 \[3\], expected.*\[4\]"),
        ({"net": {"w": torch.zeros(3).bfloat16()}}, "expected torch.bfloat16"),
        ({"net": {"v": torch.zeros(3)}}, "in one of the two only: v, w"),
        ({"net": {}}, "net has 1 tensors, expected 0"),
        ({"other": {"w": torch.zeros(3)}}, "no part other; it has net"),
    ],
)
def test_a_state_of_other_tensors_is_refused(tmp_path, targets, message):
    _saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=message):
        restore_checkpoint(FS, str(tmp_path), 1, targets)


def test_a_step_that_is_not_there(tmp_path):
    assert load_checkpoint(FS, str(tmp_path / "nothing")) is None
    _saved(tmp_path, 1, 2)
    for call in (load_checkpoint, read_state, stored_tensors, discard_checkpoint):
        with pytest.raises(CheckpointError, match=r"checkpoint.* 3"):
            call(FS, str(tmp_path), 3)
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; it has 1, 2"):
        restore_checkpoint(FS, str(tmp_path), 3, {})


@pytest.mark.parametrize("name", ["../net", "a/b", "", ".hidden", "n" * 101])
def test_a_part_whose_name_is_no_file_name(tmp_path, name):
    with pytest.raises(ValueError, match="it names files"):
        save_checkpoint(FS, str(tmp_path), Checkpoint(1, {name: {"w": torch.ones(1)}}, {}))


def test_saving_a_step_again_replaces_it(tmp_path):
    root = str(tmp_path)
    two = {"net": {"w": torch.ones(3)}, "extra": {"v": torch.ones(1)}}
    save_checkpoint(FS, root, Checkpoint(1, two, {}))
    folder = _saved(tmp_path, 1)
    assert not (folder / "extra-00000.safetensors").exists()
    (folder / MARKER).unlink()
    (folder / "left-00007.safetensors").write_bytes(b"torn")
    _saved(tmp_path, 1)
    discard_checkpoint(FS, root, 1)
    _saved(tmp_path, 1)
    found = load_checkpoint(FS, root)
    assert found is not None
    _check_same(found.parts["net"], _checkpoint(1).parts["net"])
    assert len(list(folder.iterdir())) == 4


def test_no_pickle(tmp_path, monkeypatch):
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("pickle")

    folder = _saved(tmp_path, 1)
    for module, name in (
        (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (pickle, "dumps"),
        (pickle, "dump"), (pickle, "Pickler"), (torch, "load"), (torch, "save"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
    _saved(tmp_path, 2)
    load_checkpoint(FS, str(tmp_path), 1)
    restore_checkpoint(FS, str(tmp_path), 1, {"net": {"w": torch.zeros(3)}})
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


# ---------------------------------------------------------------------- damage


def test_a_folder_without_marker_does_not_exist(tmp_path):
    assert load_checkpoint(FS, str(tmp_path)) is None
    (_saved(tmp_path, 1, 2) / MARKER).unlink()
    found = load_checkpoint(FS, str(tmp_path))
    assert found is not None and found.step == 1


FILES = ("net-00000.safetensors", "index.json", "state.json", MARKER)


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_an_error(tmp_path, name):
    file = _saved(tmp_path, 1, 2) / name
    whole = file.read_bytes()
    for index in range(len(whole)):
        file.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        with pytest.raises(CheckpointError, match=r"--from previous to go on from step 1$") as e:
            load_checkpoint(FS, str(tmp_path))
        assert name == MARKER or name in str(e.value)
    file.write_bytes(whole)
    assert load_checkpoint(FS, str(tmp_path)) is not None


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("damage", ["truncate", "lengthen", "remove"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path, name, damage):
    file = _saved(tmp_path, 7) / name
    raw = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(raw[:-3] if damage == "truncate" else raw + b" ")
    with pytest.raises(CheckpointError, match=f"{name} .*there is no other one"):
        load_checkpoint(FS, str(tmp_path))
    with pytest.raises(CheckpointError, match=f"{name} .*there is no other one"):
        restore_checkpoint(FS, str(tmp_path), 7, {"net": {"w": torch.zeros(3)}})


def test_the_state_alone_is_verified_too(tmp_path):
    file = _saved(tmp_path, 1) / "state.json"
    assert read_state(FS, str(tmp_path), 1) == {"step": 1, "note": "x"}
    file.write_text(file.read_text().replace("x", "y"))
    with pytest.raises(CheckpointError, match=r"state\.json does not match its checksum"):
        read_state(FS, str(tmp_path), 1)


# ---------------------------------------------------------------------- made by a stranger


def _forge(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file, and make the marker's checksums right again."""
    found = json.loads((folder / name).read_text())
    raw = json.dumps(change(found) or found).encode()
    (folder / name).write_bytes(raw)
    if name != MARKER:
        marker = json.loads((folder / MARKER).read_text())
        marker["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        (folder / MARKER).write_text(json.dumps(marker))


def _set(*path: Any) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        *way, last, value = path
        for key in way:
            found = found[key]
        found[last] = value

    return change


def _moved(old: str, new: str) -> Callable[[Any], None]:
    return lambda found: found["files"].update({new: found["files"].pop(old)})


def _added(name: str) -> Callable[[Any], None]:
    return lambda found: found["files"].update({name: found["files"][NET]})


NET = "net-00000.safetensors"


@pytest.mark.parametrize(
    "change",
    [
        _added("../secret"), _added("/etc/passwd"), _added(".."), _added("a/b"), _added(""),
        _added(".hidden"), _added(MARKER), _added("MANIFEST.discarded.json"),
        _moved("index.json", "other.json"),
        _set("files", []), _set("files", NET, None), _set("files", NET, "bytes", -1),
        _set("files", NET, "bytes", 1e3), _set("files", NET, "bytes", True),
        _set("files", NET, "bytes", 1 << 60), _set("files", NET, "bytes", "84"),
        _set("files", NET, "sha256", None), _set("files", NET, "sha256", "0" * 63),
        _set("format", 2), _set("files", "index.json", "bytes", 1 << 40), lambda _: ["files"],
    ],
)  # fmt: skip
def test_a_hostile_marker_is_refused(tmp_path, change):
    _forge(_saved(tmp_path, 1, 2), MARKER, change)
    with pytest.raises(CheckpointError, match="--from previous to go on from step 1"):
        load_checkpoint(FS, str(tmp_path))


W = ("tensors", "net", "w")
CHUNK = (*W, "chunks", 0)


@pytest.mark.parametrize(
    "change",
    [
        _set(*CHUNK, "file", "../checkpoint-00000001/" + NET), _set(*CHUNK, "file", "state.txt"),
        _set(*CHUNK, "file", None), _set(*CHUNK, "file", "state.json"), _set(*CHUNK, "key", 3),
        _set(*CHUNK, "key", "v"), _set(*CHUNK, "sizes", [2]), _set(*CHUNK, "sizes", [4]),
        _set(*CHUNK, "sizes", [3, 1]), _set(*CHUNK, "offsets", [1]), _set(*CHUNK, "offsets", [-1]),
        _set(*CHUNK, "offsets", []), _set(*W, "size", [1 << 62]), _set(*W, "size", [2]),
        _set(*W, "size", [1 << 40, 1 << 40, 0]), _set(*W, "size", [0] * 99),
        _set(*W, "size", [3.0]), _set(*W, "size", "3"), _set(*W, "size", [True]),
        _set(*W, "dtype", "F16"), _set(*W, "dtype", "O"), _set(*W, "dtype", ["F32"]),
        _set(*W, "chunks", []), _set(*W, "chunks", None), _set(*CHUNK, []), _set(*W, None),
        _set("tensors", "net", []), _set("tensors", "../net", {}), _set("tensors", None),
        _set("format", "1"), lambda _: [1], _set(*W, "size", [6]),
        lambda i: i["tensors"]["net"]["w"].update(  # less than the file's tensor has
            size=[2], chunks=[{"offsets": [0], "sizes": [2], "file": NET, "key": "w"}]
        ),
        lambda i: i["tensors"]["net"]["w"]["chunks"].append(dict(
            i["tensors"]["net"]["w"]["chunks"][0], offsets=[0], sizes=[0]
        )),
        lambda i: i["tensors"]["net"].update(  # 4 TB that no file holds
            v={"dtype": "F32", "size": [1 << 40], "chunks": [
                {"offsets": [0], "sizes": [1 << 40], "file": NET, "key": "w"}
            ]}
        ),
    ],
)  # fmt: skip
def test_a_hostile_index_is_refused(tmp_path, change):
    _forge(_saved(tmp_path, 1, 2), "index.json", change)
    with pytest.raises(CheckpointError, match="--from previous to go on from step 1"):
        load_checkpoint(FS, str(tmp_path))


def test_memory_is_not_set_aside_for_a_file_that_is_not_there(tmp_path):
    folder, huge = _saved(tmp_path, 1), 1 << 46
    _forge(folder, MARKER, _set("files", NET, "bytes", huge))
    _forge(folder, "index.json", _set(*W, "size", [huge // 4]))
    _forge(folder, "index.json", _set(*CHUNK, "sizes", [huge // 4]))
    with pytest.raises(CheckpointError, match=f"{NET} does not match"):
        load_checkpoint(FS, str(tmp_path))


def test_json_that_breaks_parsers_is_refused(tmp_path):
    marker = _saved(tmp_path, 1) / MARKER
    for raw in (b"[" * 100_000, b'{"files": ' + b"9" * 5000 + b"}", b"\xff\xfe", b"", b"null"):
        marker.write_bytes(raw)
        with pytest.raises(CheckpointError, match=MARKER):
            load_checkpoint(FS, str(tmp_path))


def test_a_forged_part_is_refused(tmp_path):
    """Checksums and sizes are right, the content is not what the index says."""
    folder = _saved(tmp_path, 1)
    length = (folder / NET).stat().st_size
    raw = safetensors.torch.save({"w": torch.zeros(3, dtype=torch.int32)}).ljust(length, b" ")
    for content in (raw, b"\xff" * length):
        (folder / NET).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        _forge(folder, MARKER, _set("files", NET, {"bytes": len(content), "sha256": sha256}))
        with pytest.raises(CheckpointError, match=f"{NET} is not what the index says"):
            load_checkpoint(FS, str(tmp_path))


# ---------------------------------------------------------------------- which ones there are


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path):
    """(filesystem, root) of a run's checkpoints."""
    if request.param == "disk":
        return FS, str(tmp_path / "run")
    store = request.getfixturevalue("s3_store")
    return store.fs, store.path("run", "checkpoints")


def test_checkpoints_of_a_run(place):
    fs, root = place
    assert committed_steps(fs, root) == [] and collect_orphans(fs, root) == []
    for step in range(1, 8):
        save_checkpoint(fs, root, _checkpoint(step))
    fs.pipe_file(f"{root}/checkpoint-best/{MARKER}", b"{}")  # a name that is not ours
    prune_checkpoints(fs, root, keep=4, also=[1])
    assert committed_steps(fs, root) == [1, 4, 5, 6, 7]
    assert not fs.exists(checkpoint_path(root, 2))

    for _ in range(2):
        discard_checkpoint(fs, root, 7)
        assert committed_steps(fs, root) == [1, 4, 5, 6]
    for step in (5, 6):
        fs.rm_file(f"{checkpoint_path(root, step)}/{MARKER}")
    assert collect_orphans(fs, root) == [checkpoint_path(root, 5), checkpoint_path(root, 6)]
    assert not fs.exists(checkpoint_path(root, 6)) and not fs.exists(checkpoint_path(root, 5))
    assert fs.exists(f"{checkpoint_path(root, 7)}/{FILES[0]}")  # kept to be looked at
    found = load_checkpoint(fs, root)
    assert found is not None and found.step == 4
    targets = {"w": torch.zeros(3)}
    assert restore_checkpoint(fs, root, 1, {"net": targets}) == {"step": 1, "note": "x"}
    assert torch.equal(targets["w"], torch.ones(3))
    with pytest.raises(ValueError, match="keep is 0"):
        prune_checkpoints(fs, root, keep=0)


def test_a_bucket_that_is_gone_is_not_created_by_a_save(s3_store):
    with pytest.raises(CheckpointError, match="bucket does not exist"):
        save_checkpoint(s3_store.fs, "gone/run", _checkpoint(1))
    assert "gone" not in s3_store.fs.ls("")


def test_damage_on_s3(s3_store):
    fs, root = s3_store.fs, s3_store.path("run")
    for step in (3, 4):
        save_checkpoint(fs, root, _checkpoint(step))
    path = f"{checkpoint_path(root, 4)}/{NET}"
    raw = fs.cat_file(path)
    for damaged in (raw[:-1] + b"!", raw[:-1]):
        fs.pipe_file(path, damaged)
        with pytest.raises(CheckpointError, match=f"{NET} .* go on from step 3$"):
            load_checkpoint(fs, root)
    fs.rm_file(path)
    with pytest.raises(CheckpointError, match=f"{NET} is missing.* go on from step 3$"):
        load_checkpoint(fs, root)
