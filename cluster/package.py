"""What a working directory weighs before it is sent, counted by Ray's own rules."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.job_server import SubmitError, quiet_packaging

_LARGEST = 5


@dataclass(frozen=True)
class Package:
    """What would travel: paths relative to the folder → bytes; `uri`: Ray's name of the content."""

    folder: str
    uri: str
    files: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    def __str__(self) -> str:
        return f"{in_units(self.bytes)} in {len(self.files)} files"


def measure(folder: str, excludes: Sequence[str]) -> Package:
    """Count and hash what Ray would pack of `folder`: `excludes`, `.gitignore` and `.rayignore`
    apply. Raises `SubmitError` where that is more than a cluster takes."""
    from ray._private.ray_constants import (
        RAY_RUNTIME_ENV_IGNORE_GITIGNORE,
        get_runtime_env_default_excludes,
    )
    from ray._private.runtime_env.packaging import get_uri_for_directory

    quiet_packaging()
    every = [*get_runtime_env_default_excludes(), *excludes]
    gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    files = _files(Path(folder).absolute(), every, gitignore)
    _refuse_too_much(folder, files)  # before the content of so many bytes is read
    uri = get_uri_for_directory(folder, include_gitignore=gitignore, excludes=every)
    return Package(folder, uri, files)


def in_units(size: float) -> str:
    """4100000 → `4.1 MB`."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _files(root: Path, excludes: list[str], gitignore: bool) -> dict[str, int]:
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    files: dict[str, int] = {}

    def count(path: Path) -> None:
        if path.is_file():
            files[str(path.relative_to(root))] = path.stat().st_size

    _dir_travel(root, [_get_excludes(root, excludes)], count, include_gitignore=gitignore)
    return files


def _refuse_too_much(folder: str, files: dict[str, int]) -> None:
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    total = sum(files.values())
    if total < GCS_STORAGE_MAX_SIZE:
        return
    largest = sorted(files, key=files.__getitem__, reverse=True)[:_LARGEST]
    named = ", ".join(f"{name} ({in_units(files[name])})" for name in largest)
    limit = f"{GCS_STORAGE_MAX_SIZE / 2**20:.0f} MiB"
    raise SubmitError(
        f"the working directory {os.path.abspath(folder)} has {in_units(total)} in {len(files)} "
        f"files; a cluster takes less than {limit}. The largest: {named}. Name what is not needed "
        "in a .rayignore file (patterns as in .gitignore), keep data and weights in a bucket, or "
        "submit from a smaller folder (--working-dir)",
        transient=False,
    )
