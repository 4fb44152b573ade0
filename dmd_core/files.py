"""Files that are either whole or absent, on any fsspec filesystem."""

import os
import sys
import uuid
from collections.abc import Callable

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem


def is_local(fs: AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def join(root: str, *parts: str) -> str:
    return "/".join([root.rstrip("/"), *parts])


def store_errors() -> tuple[type[Exception], ...]:
    """What a store raises: as replies, and from below them (botocore, its HTTP client)."""
    if "botocore" not in sys.modules:  # nothing remote was opened
        return (OSError,)
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError
    from botocore.parsers import ResponseParserError

    return (OSError, BotoCoreError, ClientError, ResponseParserError)


def write_atomic(fs: AbstractFileSystem, path: str, data: bytes) -> None:
    """Write `data` so that a reader sees all of it or nothing, and a kill leaves no torn file.

    A single PUT is atomic on an object store; a local disk needs a temporary file, a flush to the
    disk and a rename.
    """
    if is_local(fs):
        publish_local(path, data, os.replace)
    else:
        fs.pipe_file(path, data)


def publish_local(path: str, data: bytes, publish: Callable[[str, str], None]) -> None:
    """Finish a temporary file on the disk, then `publish(temporary, path)`.

    `os.replace` puts it there whatever stood at `path`; `os.link` only if nothing did.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
