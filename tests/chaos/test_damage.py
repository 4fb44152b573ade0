"""Damaged, foreign and edited files of a data set are named, and nothing is trained on them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from jobs.errors import Exit
from pipelines.batches import PairFileError
from pipelines.following import PairVersions
from pipelines.manifest import load_manifest, manifest_path
from pipelines.manifest_model import Manifest
from pipelines.pins import Pins
from pipelines.seal import SealError, seal_generation
from pipelines.storage import Store, open_store
from tests.jobs.tiny_cli import run_tiny
from tests.pipelines.made_pairs import FINGERPRINT, land_ids, made_table, write_file
from tests.pipelines.sealed_sets import write_table
from tests.pipelines.test_training import PAIRS, pairs  # noqa: F401  (a fixture)


@pytest.fixture
def copied(pairs, tmp_path) -> tuple[Store, Path]:  # noqa: F811
    """A data set of one's own, and its (first) data file."""
    shutil.copytree(pairs[0].root, tmp_path / "set")
    root = open_store(str(tmp_path / "set"))
    return root, Path(root.path(load_manifest(root, 1).files[0].key))


@pytest.fixture
def train(copied, tiny_teacher_dir, tmp_path, capfd, monkeypatch):
    """`dmd train` up to the moment when workers would start: (exit code, stderr)."""
    import jobs.session

    def no_ray(self):
        raise AssertionError("not refused")

    monkeypatch.setattr(jobs.session.Session, "start_ray", no_ray)
    (tmp_path / "prompts.txt").write_text("a prompt")
    base = {
        "run.dir": tmp_path / "run", "teacher.path": tiny_teacher_dir,
        "pairs.prompts": tmp_path / "prompts.txt", "pairs.root": copied[0].url,
    }  # fmt: skip
    return lambda: run_tiny("train", base, {}, capfd)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_bit_of_a_latent(path: Path) -> None:
    """The file can be read all the same, and has its size: only the checksum tells."""
    raw, latent = path.read_bytes(), pq.read_table(path)["latent"][0].as_py()
    assert latent in raw
    path.write_bytes(raw.replace(latent, bytes([latent[0] ^ 1]) + latent[1:]))


def foreign(path: Path) -> None:
    table = made_table(range(1, 5), replace(FINGERPRINT, steps=77))
    write_table(open_store(str(path.parent)), path.name, table)


DAMAGE = {"truncated": truncate, "a flipped bit": flip_a_bit_of_a_latent, "foreign": foreign}


@pytest.mark.parametrize("damage", DAMAGE)
def test_inspect_names_a_damaged_file(copied, capfd, damage):
    root, path = copied
    arguments = ["inspect", root.root, "--checksums", "--config", "tiny"]
    assert main(arguments) == Exit.OK
    DAMAGE[damage](path)
    assert main(arguments) == Exit.REFUSED and str(path) in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_training_refuses_a_damaged_file_at_the_door(copied, train, damage):
    DAMAGE[damage](copied[1])
    code, message = train()
    assert code == Exit.REFUSED and str(copied[1]) in message


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_worker_trains_on_no_row_of_a_damaged_file(copied, damage):
    root, path = copied
    manifest = load_manifest(root, 1)
    pins = Pins(1, {1: manifest.digest})
    rows = np.arange(manifest.rows)
    assert len(PairVersions(root, pins, 0).first().rows(rows)) == manifest.rows
    DAMAGE[damage](path)
    with pytest.raises(PairFileError, match=path.name):
        PairVersions(root, pins, 0).first().rows(rows)


@pytest.mark.parametrize("damage", DAMAGE)
def test_sealing_names_a_damaged_file(tmp_path, damage):
    root = open_store(str(tmp_path / "set"))
    landed = land_ids(root, range(8))
    path = Path(write_file(root, "a-0.parquet", range(8)))
    if damage == "a flipped bit":
        before = seal_generation(root, FINGERPRINT, landed)  # then the bit is flipped
        DAMAGE[damage](path)
        try:
            after = seal_generation(root, FINGERPRINT, landed)
        except SealError as error:
            assert str(path) in str(error)
            return
        pytest.fail(
            f"a file that version {before.version} named was sealed anew in {after.version}"
        )
    DAMAGE[damage](path)
    with pytest.raises(SealError, match=r"a-0\.parquet"):
        seal_generation(root, FINGERPRINT, landed)


EDITS = {
    "rows": lambda m: m | {"rows": m["rows"] + 1},
    "version": lambda m: m | {"version": 2},
    "sampler": lambda m: m | {"fingerprint": m["fingerprint"] | {"steps": 99}},
    "a file twice": lambda m: m | {"files": m["files"] * 2, "rows": 2 * m["rows"]},
    "outside": lambda m: _with_key(m, "../../etc/passwd"),
    "absolute": lambda m: _with_key(m, "/etc/passwd"),
    "another generation": lambda m: _with_key(m, f"generations/{'0' * 16}/data/a-0.parquet"),
    "dots": lambda m: _with_key(m, m["files"][0]["key"].replace("/data/", "/data/../data/")),
    "checksum": lambda m: m | {"files": [m["files"][0] | {"sha256": "0"}, *m["files"][1:]]},
    "another field": lambda m: m | {"extra": 1},
}


def _with_key(content: dict, key: str) -> dict:
    return content | {"files": [content["files"][0] | {"key": key}, *content["files"][1:]]}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_refused_by_name(copied, train, capfd, edit):
    root, _ = copied
    path = Path(manifest_path(root, 1))
    path.write_text(json.dumps(EDITS[edit](json.loads(path.read_text()))))
    code, message = train()
    assert code == Exit.REFUSED and str(path) in message, message
    for more in ([], ["--checksums"]):
        assert main(["inspect", root.root, "--config", "tiny", *more]) == Exit.REFUSED
        assert str(path) in capfd.readouterr().err


def test_a_manifest_that_was_edited_well_is_not_the_one_that_a_run_has_pinned(copied):
    from dmd_core.checkpoint import CheckpointError

    root, _ = copied
    manifest = load_manifest(root, 1)
    edited = Manifest.model_validate(manifest.content() | {"statistics": {"latent_std": 9.0}})
    Path(manifest_path(root, 1)).write_bytes(edited.to_bytes())
    with pytest.raises(CheckpointError, match="version 1 has digest"):
        PairVersions(root, Pins(1, {1: manifest.digest}), 0)
