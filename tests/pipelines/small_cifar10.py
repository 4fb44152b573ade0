"""A data set with CIFAR-10's form, 40 pictures a part, and the archives it comes in."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines import cifar10
from pipelines.storage import Store

COUNT = 40
NPM, BINARY, PYTHON = "package", "cifar-10-batches-bin", "cifar-10-batches-py"


def small_parts() -> dict[str, cifar10.Part]:
    """Every class four times a part. Each class has a colour of its own, with a little noise."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, size=(10, 3))
    parts = {}
    for name in cifar10.PUBLISHED:
        labels = rng.permutation(np.arange(COUNT) % 10).astype(np.uint8)
        noise = rng.integers(-20, 20, size=(COUNT, 32, 32, 3))
        pictures = (colours[labels][:, None, None] + noise).astype(np.uint8)
        parts[name] = cifar10.Part(pictures, labels)
    return parts


def digests(parts: dict[str, cifar10.Part]) -> dict[str, str]:
    return {name: part.digest() for name, part in parts.items()}


def sheet(part: cifar10.Part, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(part.pictures.reshape(-1, 1024, 3)).save(buffer, format=kind)
    return buffer.getvalue()


def npm_files(parts: dict[str, cifar10.Part]) -> dict[str, bytes]:
    train = [part.labels for name, part in parts.items() if name != "test_batch"]
    return {
        "package.json": b"{}",
        **{f"{name}.png": sheet(part) for name, part in parts.items()},
        "train_lables.json": json.dumps(np.concatenate(train).tolist()).encode(),
        "test_lables.json": json.dumps(parts["test_batch"].labels.tolist()).encode(),
    }


def binary_files(parts: dict[str, cifar10.Part]) -> dict[str, bytes]:
    return {f"{name}.bin": records(part) for name, part in parts.items()}


def records(part: cifar10.Part) -> bytes:
    """Written a byte at a time, as the data set's page describes them."""
    rows = bytearray()
    for picture, label in zip(part.pictures, part.labels, strict=True):
        rows.append(label)
        for channel in range(3):
            rows += picture[:, :, channel].tobytes()
    return bytes(rows)


def tarball(path: Path, folder: str, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def write_small(target: Store, folder: Path) -> dict[str, cifar10.Part]:
    """A complete data set at `target`, made from a tarball in `folder`."""
    parts = small_parts()
    source = tarball(folder / "binary.tar.gz", BINARY, binary_files(parts))
    cifar10.write_parts(source, target, list(parts), digests(parts))
    cifar10.finish(target, source, digests(parts))
    return parts
