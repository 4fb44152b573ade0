"""The folder of one checkpoint: its files are read only as its marker describes them."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fsspec import AbstractFileSystem

from dmd_core.checkpoint.format import (
    DISCARDED,
    MARKER,
    MAX_JSON_BYTES,
    StoredFile,
    UntrustedError,
    parse_marker,
)
from dmd_core.files import is_local, join


def read_bytes(fs: AbstractFileSystem, path: str) -> bytes:
    raw = fs.cat_file(path)
    assert isinstance(raw, bytes)
    return raw


def remove_folder(fs: AbstractFileSystem, path: str) -> None:
    """Remove a checkpoint so that a kill leaves no half of it that is believed."""
    for name in (MARKER, DISCARDED):
        if fs.exists(join(path, name)):
            fs.rm_file(join(path, name))
            sync_folder(fs, path)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def sync_folder(fs: AbstractFileSystem, path: str) -> None:
    """Make the names in a local folder survive a power cut."""
    if not is_local(fs):
        return
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass(frozen=True)
class MarkedFolder:
    """The files of one checkpoint that its marker vouches for."""

    fs: AbstractFileSystem
    path: str
    files: Mapping[str, StoredFile]

    @staticmethod
    def open(fs: AbstractFileSystem, path: str) -> "MarkedFolder":
        marker = join(path, MARKER)
        check_size(fs, marker, None)
        return MarkedFolder(fs, path, parse_marker(read_bytes(fs, marker), marker))

    def check_sizes(self, names: Iterable[str]) -> None:
        """Raises `UntrustedError` for a file that is not there in full; reads none of them."""
        for name in names:
            check_size(self.fs, join(self.path, name), self.files[name].bytes)

    def read(self, name: str) -> bytes:
        """A small file, verified."""
        path, expected = join(self.path, name), self.files[name]
        if expected.bytes > MAX_JSON_BYTES:
            raise UntrustedError(f"{path} has {expected.bytes} bytes, too many for its kind")
        self.check_sizes([name])
        raw = read_bytes(self.fs, path)
        self._check(name, StoredFile(len(raw), hashlib.sha256(raw).hexdigest()))
        return raw

    @contextmanager
    def verified(self, name: str) -> Iterator[str]:
        """A local path of a file, verified: the file itself, or a copy for this while."""
        self.check_sizes([name])
        path = join(self.path, name)
        if is_local(self.fs):
            self._check(name, digest(path))
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="dmd-checkpoint-") as folder:
            local = str(Path(folder) / name)
            self.fs.get_file(path, local)
            self._check(name, digest(local))
            yield local

    def _check(self, name: str, found: StoredFile) -> None:
        expected = self.files[name]
        if found != expected:
            raise UntrustedError(
                f"{join(self.path, name)} does not match its checksum (expected "
                f"{expected.bytes} bytes, sha256 {expected.sha256[:12]}…; found {found.bytes} "
                f"bytes, sha256 {found.sha256[:12]}…)"
            )


def digest(path: str) -> StoredFile:
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return StoredFile(file.tell(), sha256)


def check_size(fs: AbstractFileSystem, path: str, expected: int | None) -> None:
    """`expected`: bytes; None: a small file of any size."""
    try:
        found = fs.info(path)["size"]
    except FileNotFoundError as error:
        raise UntrustedError(f"{path} is missing") from error
    if expected is None and found > MAX_JSON_BYTES:
        raise UntrustedError(f"{path} has {found} bytes, too many for its kind")
    if expected is not None and found != expected:
        raise UntrustedError(
            f"{path} does not match its checksum (expected {expected} bytes, found {found} bytes)"
        )
