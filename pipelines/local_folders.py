"""Folders that a machine makes once and keeps: copies of remote ones, conversions, other views.

They lie in the user's Hugging Face cache (HF_HOME, under assets/one-step-dmd), where its tools find
and delete them. The name of a folder is a digest of what it was made from, so none is ever stale.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path, constants
from huggingface_hub.utils import WeakFileLock

from dmd_core.files import is_local
from pipelines.storage import Store

LIBRARY = "one-step-dmd"
Choose = Callable[[Sequence[str]], Iterable[str]]


class UnsafeNameError(ValueError):
    """A name in a store that would lead out of the folder that it is copied to."""


def made_once(kind: str, inputs: Any, make: Callable[[Path], None]) -> str:
    """The folder of these `inputs` (JSON), made by `make(target)` if this machine has none yet.

    Of several processes one makes it and the others wait. One that is killed leaves nothing that
    could be taken for a finished folder.
    """
    text = json.dumps(inputs, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    root = cached_assets_path(LIBRARY, kind, assets_dir=constants.HF_ASSETS_CACHE)
    target, part = root / name, root / f"{name}.part"
    with WeakFileLock(root / f"{name}.lock"):
        if not target.is_dir():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            make(part)
            os.rename(part, target)
    return str(target)


def nearby(store: Store, choose: Choose | None = None) -> str:
    """The local path of a folder or a file: itself, or this machine's copy of a remote one.

    `choose`: of a remote folder's files (relative names) those that are copied; None: all. The
    copy belongs to what the store holds now, by their sizes and ETags: when that changes, so does
    the copy. Raises `FileNotFoundError`, and `UnsafeNameError` before anything is written.
    """
    if is_local(store.fs):
        if not store.fs.exists(store.root):
            raise FileNotFoundError(store.root)
        return store.root
    found = store.fs.find(store.root, detail=True)
    if not found:
        raise FileNotFoundError(store.url)
    listing = {
        path.removeprefix(store.root).lstrip("/"): [info["size"], info.get("ETag")]
        for path, info in found.items()
    }
    if list(listing) == [""]:  # a single object
        name = store.root.rsplit("/", 1)[-1]
        folder = made_once(
            "copies", [store.url, listing], lambda to: store.fs.get_file(store.root, str(to / name))
        )
        return str(Path(folder) / name)
    if choose is None:
        _check_names(listing, store)
        return made_once(
            "copies",
            [store.url, listing],
            lambda to: store.fs.get(store.root + "/", str(to), recursive=True),
        )
    chosen = sorted(choose(list(listing)))
    _check_names(chosen, store)
    return made_once(
        "copies",
        [store.url, {name: listing[name] for name in chosen}],
        lambda to: store.fs.get(
            [store.path(name) for name in chosen], [str(to / name) for name in chosen]
        ),
    )


def _check_names(names: Iterable[str], store: Store) -> None:
    """A bucket's objects may be called anything; a disk takes `..` for the folder above."""
    for name in names:
        if name.startswith("/") or ".." in re.split(r"[/\\]", name):
            raise UnsafeNameError(
                f"{store.url} has a file {name!r}, which would be copied to another folder than "
                "its own; remove it, or name another store"
            )
