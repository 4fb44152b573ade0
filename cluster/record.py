"""What is remembered of a local cluster: a JSON file and a secret in a folder of its own."""

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.nodes import ClusterError, NodeRecord, Place, Size
from cluster.processes import Birth, find

_RECORD, _TOKEN, _LOCK = "cluster.json", "token", "lock"
_VERSION = 1


@dataclass(frozen=True)
class ClusterRecord:
    """A local cluster. `ready`: all of its nodes have answered once; the rest is a broken start."""

    place: Place
    url: str
    dashboard_host: str
    size: Size
    nodes: tuple[NodeRecord, ...] = ()
    ready: bool = False

    @property
    def port(self) -> int:
        """Of the job server."""
        return int(self.url.rsplit(":", 1)[1])


def default_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "one-step-dmd" / "cluster"


def token_path(folder: Path) -> Path:
    return folder / _TOKEN


def read_token(record: ClusterRecord) -> str:
    """The secret that the cluster asks for; "": it asks for none. Raises `ClusterError`."""
    if record.place.token is None:
        return ""
    try:
        return Path(record.place.token).read_text().strip()
    except OSError as error:
        raise ClusterError(
            f"the token of the local cluster cannot be read ({error}); `dmd cluster down` and "
            "`dmd cluster up` make a new one"
        ) from error


def read_record(folder: Path) -> ClusterRecord | None:
    """None: no cluster was started from this folder. Raises `ClusterError` for a damaged file."""
    path = folder / _RECORD
    try:
        content = json.loads(path.read_text())
        if content.pop("version") != _VERSION:
            raise ValueError("it was written by another version")
        nodes = tuple(
            NodeRecord(node["name"], node["ip"], Birth(**node["process"]))
            for node in content.pop("nodes")
        )
        place, size = Place(**content.pop("place")), Size(**content.pop("size"))
        return ClusterRecord(place=place, size=size, nodes=nodes, **content)
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ClusterError(
            f"{path} is not the record of a local cluster ({error}); expected what `dmd cluster "
            "up` writes. End the processes of that cluster by hand and remove the file"
        ) from error


def read_living(folder: Path) -> ClusterRecord | None:
    """As `read_record`, while the head lives. The file outlasts a cluster that ended with its
    machine, and another job server may listen at that address now."""
    record = read_record(folder)
    if record is None or not record.nodes or find(record.nodes[0].process) is None:
        return None
    return record


def write_record(folder: Path, record: ClusterRecord) -> None:
    content = {"version": _VERSION, **asdict(record)}
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=_RECORD, delete=False) as file:
        json.dump(content, file, indent=2)
    os.replace(file.name, folder / _RECORD)


def forget(folder: Path) -> None:
    for name in (_RECORD, _TOKEN):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, *, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One command at a time changes the cluster of a folder; the others call `on_wait` and wait."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(folder / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
