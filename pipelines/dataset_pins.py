"""Who reads which versions of a data set: `pins/<name>.json`. What is pinned is not collected."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dmd_core.files import write_atomic
from pipelines.commits import StoreError, delete_if_there, list_files, read_json
from pipelines.manifest import NoSuchVersionError, load_manifest
from pipelines.storage import Store

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Pin:
    """`holder`: in words, for people. `created`: when, as the holder's clock said."""

    name: str
    versions: tuple[int, ...]
    holder: str
    created: str


def pin_name(url: str) -> str:
    """A file name for the run at `url`: readable, and different for different runs."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return f"{_UNSAFE.sub('-', url).strip('-.')[-48:]}-{digest}"


def pin_versions(
    root: Store, name: str, versions: Iterable[int], *, holder: str, created: str
) -> None:
    """Pin `versions` for the run `name` (in place of what it had pinned before).

    Raises `NoSuchVersionError` for a version that is gone, or going, and leaves the pin as it was:
    the pin comes first, the look whether a collector means to drop it after that. A collector does
    it the other way round, so what was pinned before stays whatever it means to do.
    """
    path, versions = root.path("pins", f"{name}.json"), sorted(versions)
    before = read_json(root, path)
    _write(root, path, {"versions": versions, "holder": holder, "created": created})
    held = before["versions"] if before else []
    going = (read_json(root, intent_path(root)) or {}).get("versions", [])
    try:
        for version in versions:
            if version in going and version not in held:
                raise NoSuchVersionError(
                    f"{root.url} version {version} is being collected; a newer one is there. If "
                    "no `dmd regenerate` is running, run it once more: it ends what was cut off"
                )
            load_manifest(root, version)
    except NoSuchVersionError:
        if before:
            _write(root, path, before)
        else:
            unpin(root, name)
        raise


def _write(root: Store, path: str, content: dict[str, Any]) -> None:
    write_atomic(root.fs, path, json.dumps(content, indent=1).encode())


def intent_path(root: Store) -> str:
    """Where a collector says which versions it means to drop, while it is at work."""
    return root.path("collecting.json")


def unpin(root: Store, name: str) -> None:
    delete_if_there(root, root.path("pins", f"{name}.json"))


def read_pins(root: Store) -> dict[str, Pin]:
    """All pins by name. One that cannot be read is an error: it may name any version."""
    found = {}
    for file in list_files(root, root.path("pins")):
        if not file.endswith(".json"):
            continue
        path, name = root.path("pins", file), file.removesuffix(".json")
        content = read_json(root, path)
        if content is None:  # unpinned since it was listed
            continue
        try:
            versions = tuple(int(version) for version in content["versions"])
            found[name] = Pin(name, versions, str(content["holder"]), str(content["created"]))
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{path} is not a pin ({error}); remove it if its run is gone"
            ) from error
    return found
