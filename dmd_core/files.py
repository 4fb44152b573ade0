"""Files that are either whole or absent, on any fsspec filesystem."""

import os
import uuid

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem


def is_local(fs: AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def join(root: str, *parts: str) -> str:
    return "/".join([root.rstrip("/"), *parts])


def write_atomic(fs: AbstractFileSystem, path: str, data: bytes) -> None:
    """Write `data` so that a reader sees all of it or nothing, and a kill leaves no torn file.

    A single PUT is atomic on an object store; a local disk needs a temporary file, a flush to the
    disk and a rename.
    """
    if not is_local(fs):
        fs.pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
