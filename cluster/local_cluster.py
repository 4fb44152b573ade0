"""A Ray cluster of several nodes on this machine: start, look at, kill a node, end.

Nodes are processes of `ray start --block`, each with its own loopback address and folder; they
outlive the command that started them. Another Ray of the machine is neither joined nor ended:
only processes that are remembered by pid and birth, or carry this cluster's mark, are signalled.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil

from cluster.local_status import Status, alive_nodes, answers, read_status
from cluster.nodes import (
    DEFAULT_PORT,
    HEAD,
    MARK,
    ClusterError,
    NodeRecord,
    Place,
    Size,
    client_environment,
    free_port,
    is_free,
    new_token,
    node_environment,
    output_file,
    start_head,
    start_worker,
    worker_name,
)
from cluster.processes import end, family, find, marked
from cluster.record import (
    ClusterRecord,
    default_folder,
    forget,
    locked,
    read_record,
    token_path,
    write_record,
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_START_S = 180.0
_POLL_S = 0.2
_OUTPUT_CHARACTERS = 2000


class LocalCluster:
    """The cluster that is remembered in `folder`. Methods raise `ClusterError`."""

    def __init__(
        self, folder: str | Path | None = None, *, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        """`on_wait` is called where another command is at work on the cluster and is waited for."""
        self.folder = Path(folder or default_folder()).expanduser().absolute()
        self._on_wait = on_wait

    # ------------------------------------------------------------------ what others need

    @property
    def record(self) -> ClusterRecord:
        record = read_record(self.folder)
        if record is None:
            raise ClusterError("no local cluster is up; `dmd cluster up` starts one")
        return record

    @property
    def url(self) -> str:
        """The job server, for `--address` and RAY_API_SERVER_ADDRESS."""
        return self.record.url

    @property
    def client_environment(self) -> dict[str, str]:
        """The variables that lead a program to the job server and let it in."""
        return client_environment(self.record.url, self.record.place.token)

    @property
    def environment(self) -> dict[str, str]:
        """A whole environment for child processes that work with this cluster."""
        environment = node_environment(self.record.place, os.environ) | self.client_environment
        del environment[MARK]
        return environment

    def logs(self) -> list[Path]:
        """The folder of logs of each node."""
        root = Path(self.record.place.root)
        return sorted(folder for folder in root.glob("*/session_2*/logs"))

    # ------------------------------------------------------------------ up and down

    def up(
        self,
        size: Size,
        *,
        port: int | None = None,
        dashboard_host: str | None = None,
        auth: bool | None = None,
        tied: bool = False,
    ) -> list[str]:
        """Start the cluster, or those of its nodes that are gone; returns the names of the started.

        `auth`: every request must carry a secret. `tied`: the nodes are killed when the thread that
        called this ends. None: as a running cluster has it; else port 8265 or any other if that is
        taken, this machine alone, with a secret.
        """
        with locked(self.folder, on_wait=self._on_wait):
            record = read_record(self.folder)
            if record is not None and _works(record):
                _check_same(record, size, port, dashboard_host, auth)
                return self._start_missing(record, tied)
            if record is not None:
                self._end(record)
            record = self._plan(size, port, dashboard_host or LOOPBACK[0], auth is not False)
            with ExitStack() as on_failure:
                on_failure.callback(self._end, record)
                self._start(record, tied)
                on_failure.pop_all()
            return [node.name for node in self.record.nodes]

    def down(self) -> bool:
        """End every process of the cluster; False: there was none. Logs go to `last-logs`."""
        with locked(self.folder, on_wait=self._on_wait):
            record = read_record(self.folder)
            if record is not None:
                self._end(record)
            return record is not None

    def kill_node(self, index: int) -> None:
        """Kill worker `index` (from 1) with all that runs there, as when a machine loses power."""
        with locked(self.folder, on_wait=self._on_wait):
            name = worker_name(index)
            node = next((node for node in self.record.nodes if node.name == name), None)
            if node is None or find(node.process) is None:
                workers = [node.name for node in self.record.nodes[1:] if find(node.process)]
                raise ClusterError(
                    f"there is no {name} to kill; alive: {', '.join(workers) or 'none'}"
                )
            end(family(node.process))

    def add_node(self, *, tied: bool = False) -> int:
        """Start one more worker; returns its index."""
        with locked(self.folder, on_wait=self._on_wait):
            record = self.record
            size = replace(record.size, nodes=record.size.nodes + 1)
            record = replace(record, size=size)
            write_record(self.folder, record)
            self._start_workers(record, [size.nodes - 1], tied)
            return size.nodes - 1

    def _plan(self, size: Size, port: int | None, host: str, auth: bool) -> ClusterRecord:
        """Choose ports and folders, and remember them before the first process starts."""
        if port is None:
            port = DEFAULT_PORT if is_free(DEFAULT_PORT) else free_port()
        elif not is_free(port):
            raise ClusterError(
                f"port {port} is taken by another program; give another --port, or none to let one "
                "be chosen"
            )
        token = None
        if auth:
            token = str(token_path(self.folder))
            new_token(Path(token))
        # Ray's sockets stand below it, and their names must be short: not in `folder`.
        root = tempfile.mkdtemp(prefix="dmd-ray-", dir="/tmp")
        url = f"http://{_reachable(host)}:{port}"
        record = ClusterRecord(Place(root, free_port(), token), url, host, size)
        write_record(self.folder, record)
        return record

    def _start(self, record: ClusterRecord, tied: bool) -> None:
        node = start_head(
            record.place,
            record.size,
            dashboard_host=record.dashboard_host,
            dashboard_port=record.port,
            tied=tied,
        )
        record = replace(record, nodes=(node,))
        write_record(self.folder, record)
        _wait(record, [node], lambda: answers(record) and HEAD in _names(record), "the job server")
        self._start_workers(record, list(range(1, record.size.nodes)), tied)

    def _start_missing(self, record: ClusterRecord, tied: bool) -> list[str]:
        alive = {node.name for node in record.nodes if find(node.process)}
        missing = [i for i in range(1, record.size.nodes) if worker_name(i) not in alive]
        if missing:
            self._start_workers(record, missing, tied)
        return [worker_name(index) for index in missing]

    def _start_workers(self, record: ClusterRecord, indices: list[int], tied: bool) -> None:
        before = {node.id for node in alive_nodes(record)}
        nodes = {node.name: node for node in record.nodes}
        for index in indices:
            node = start_worker(record.place, record.size, index, tied=tied)
            nodes[node.name] = node
            record = replace(record, nodes=tuple(nodes.values()))
            write_record(self.folder, record)
        names = {worker_name(index) for index in indices}

        def joined() -> bool:
            return names <= _names(record, besides=before)

        watched = [node for name, node in nodes.items() if name in names | {HEAD}]
        _wait(record, watched, joined, "Ray's list of nodes")
        write_record(self.folder, replace(record, ready=True))

    def _end(self, record: ClusterRecord) -> None:
        """End everything that belongs to the cluster, keep the logs, forget the rest."""
        record = read_record(self.folder) or record  # with the nodes that were started since
        root = Path(record.place.root)
        ask = [process for node in record.nodes if (process := find(node.process))]
        everything = [process for node in record.nodes for process in family(node.process)]
        end([*everything, *_marked(root)], ask=ask)
        end(_marked(root))  # what was being started meanwhile
        _keep_logs(root, self.folder / "last-logs")
        shutil.rmtree(root, ignore_errors=True)
        forget(self.folder)

    def status(self) -> Status:
        """What runs now. Raises `ClusterError` where there is no cluster or it does not answer."""
        return read_status(self.record)


@contextmanager
def local_cluster(
    *,
    nodes: int = 3,
    cpus: int = 2,
    gpus: int = 0,
    object_store_mb: int = 256,
    auth: bool = True,
    folder: str | Path | None = None,
) -> Iterator[LocalCluster]:
    """A cluster for the length of a block, on ports and in a folder of its own.

    It ends with the block, and on Linux with the thread that entered it, even when that is killed.
    """
    with tempfile.TemporaryDirectory(prefix="dmd-cluster-") as temporary:
        cluster = LocalCluster(folder or temporary)
        size = Size(nodes=nodes, cpus=cpus, gpus=gpus, object_store_mb=object_store_mb)
        cluster.up(size, port=free_port(), auth=auth, tied=True)
        try:
            yield cluster
        finally:
            cluster.down()


def _works(record: ClusterRecord) -> bool:
    return record.ready and find(record.nodes[0].process) is not None


def _check_same(
    record: ClusterRecord, size: Size, port: int | None, host: str | None, auth: bool | None
) -> None:
    now, token = record.size, record.place.token is not None
    has = (now.in_words, now.object_store_mb, record.port, record.dashboard_host, token)
    asked = (size.in_words, size.object_store_mb, port, host, auth)
    names = ("size", "MiB of a node's object store", "port", "address to listen at", "token")
    others = [
        f"{name}: {old!r}, asked for {new!r}"
        for name, old, new in zip(names, has, asked, strict=True)
        if new is not None and new != old
    ]
    if others:
        raise ClusterError(
            f"the local cluster is up already, with other settings ({'; '.join(others)}); "
            "`dmd cluster down` first"
        )


def _wait(
    record: ClusterRecord, nodes: list[NodeRecord], done: Callable[[], bool], what: str
) -> None:
    """Until `done()`; a server on its way up that does not answer is asked again."""
    deadline = time.monotonic() + _START_S
    while True:
        with suppress(ClusterError):
            if done():
                return
        lost = next((node for node in nodes if not find(node.process)), None)
        if lost is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            continue
        why = f"{lost.name} ended at once" if lost else f"{what} did not answer in {_START_S:.0f} s"
        said = output_file(record.place.root, (lost or nodes[-1]).name).read_text(errors="replace")
        raise ClusterError(f"the local cluster did not start: {why}. What it said:\n{_tail(said)}")


def _names(record: ClusterRecord, *, besides: Set[str] = frozenset()) -> set[str]:
    """Of the nodes that Ray holds alive, without those with the ids `besides`."""
    return {node.name for node in alive_nodes(record) if node.id not in besides}


def _tail(text: str) -> str:
    return text[-_OUTPUT_CHARACTERS:].strip() or "(nothing)"


def _reachable(host: str) -> str:
    """An address of this machine at which a server that listens at `host` answers."""
    if host in ("0.0.0.0", "::", "localhost"):
        host = LOOPBACK[0]
    return f"[{host}]" if ":" in host else host


def _marked(root: Path) -> list[psutil.Process]:
    """All processes of the cluster but this one, which may run as a job of it."""
    return [process for process in marked(MARK, str(root)) if process.pid != os.getpid()]


def _keep_logs(root: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for source in [*root.glob("*.out"), *root.glob("*/session_2*/logs")]:
        node = source.stem if source.is_file() else source.parent.parent.name
        folder = target / node
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(source, folder / source.name)
