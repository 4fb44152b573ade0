"""The one primitive that all shared state rests on: create a small JSON object, once.

A version, a lease, a due slot of a schedule: each exists when its object does, and the first to
create it owns it. A lost reply is not a lost write, so every object carries a `commit_id` that
tells its writer from any other.
"""

import json
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fsspec import AbstractFileSystem

from dmd_core.files import is_local, publish_local, store_errors
from pipelines.storage import Store

_ATTEMPTS = 10


class StoreError(RuntimeError):
    """A store on which shared state cannot be kept safely, or an object that cannot be read."""


def new_commit_id() -> str:
    return uuid.uuid4().hex


def create_once(store: Store, path: str, content: Mapping[str, Any]) -> bool:
    """Create the JSON object at `path` unless something is there. True: it holds `content`.

    After any error the object is read back, and its commit_id says whether it is ours (True),
    another writer's (False) or absent (again). Raises `StoreError` when that stays unknown.
    """
    commit_id = content["commit_id"]
    data = json.dumps(content, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"
    problem: BaseException | None = None
    for attempt in range(_ATTEMPTS):
        problem = _create(store.fs, path, data)
        if problem is None:
            return True
        owner = _owner(store.fs, path)
        if owner is not None:
            return owner == commit_id
        time.sleep(0.05 * 2 ** min(attempt, 4))
    raise StoreError(f"could not create {path} in {_ATTEMPTS} attempts: {problem}") from problem


def read_json(store: Store, path: str) -> dict[str, Any] | None:
    """The JSON object at `path`; None: there is none."""
    try:
        raw = store.fs.cat_file(path)
    except FileNotFoundError:
        return None
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise StoreError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise StoreError(f"{path} holds {type(content).__name__}; expected a JSON object")
    return content


def list_files(store: Store, folder: str) -> list[str]:
    """Names of the files right in `folder` (an absolute path), sorted; none if it is not there."""
    try:
        entries = store.fs.ls(folder, detail=True)
    except FileNotFoundError:
        return []
    names = (entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file")
    return sorted(name for name in names if name)  # some stores list the folder itself


def delete_if_there(store: Store, path: str) -> None:
    try:
        store.fs.rm_file(path)
    except FileNotFoundError:
        return


def check_create_only(root: Store) -> None:
    """Refuse a store that lets a second writer overwrite: there, versions would be lost."""
    probe = root.path("leases", f".probe-{uuid.uuid4().hex}")
    first, second = {"commit_id": new_commit_id()}, {"commit_id": new_commit_id()}
    create_once(root, probe, first)
    overwritten = create_once(root, probe, second) or read_json(root, probe) != first
    delete_if_there(root, probe)
    if overwritten:
        raise StoreError(
            f"{root.url} overwrites an object that was to be created only once (If-None-Match is "
            "ignored). Versions could be lost there; expected a store with conditional writes."
        )


def _create(fs: AbstractFileSystem, path: str, data: bytes) -> BaseException | None:
    """Create `path`, or return the error; after one, `path` may or may not hold `data`."""
    try:
        if is_local(fs):
            publish_local(path, data, os.link)  # whole, and only if absent
        else:
            fs.pipe_file(path, data, mode="create")
    except PermissionError as error:
        raise StoreError(f"cannot create {path}: {error}") from error
    except store_errors() as error:
        return error
    return None


def _owner(fs: AbstractFileSystem, path: str) -> str | None:
    """The commit_id stored at `path`; "" when it has none; None when nothing is seen there."""
    try:
        content = json.loads(fs.cat_file(path))
    except store_errors():
        return None
    except ValueError:
        return ""
    return str(content.get("commit_id", "")) if isinstance(content, dict) else ""
