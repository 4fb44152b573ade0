"""What a local cluster answers when it is asked: its nodes, what is in use, the jobs that run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from cluster.nodes import HEAD, ClusterError, NodeRecord
from cluster.processes import find
from cluster.record import ClusterRecord, read_token

_TIMEOUT_S = 10
_ACTIVE = ("PENDING", "RUNNING")


@dataclass(frozen=True)
class RayNode:
    """A node that is alive for Ray. `resources`: name → total."""

    id: str
    name: str
    resources: dict[str, float]


@dataclass(frozen=True)
class NodeStatus:
    """`state`: alive, joining (a process that Ray does not list yet) or gone. `cpus`, `gpus`:
    logical."""

    name: str
    state: str
    ip: str | None
    pid: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class JobStatus:
    """A job that has not ended."""

    id: str
    state: str
    command: str


@dataclass(frozen=True)
class Status:
    """`usage`: resource → (used, total) over all nodes."""

    url: str
    nodes: tuple[NodeStatus, ...]
    usage: dict[str, tuple[float, float]]
    jobs: tuple[JobStatus, ...]


def answers(record: ClusterRecord) -> bool:
    """Whether the job server at the cluster's address answers, and is this cluster's."""
    try:
        session = _get(record, "/api/version")["session_name"]
    except ClusterError:
        return False
    return (Path(record.place.root) / HEAD / session).is_dir()


def alive_nodes(record: ClusterRecord) -> list[RayNode]:
    """The nodes that Ray holds alive: a killed one is listed until its heartbeat is missed."""
    listed = _get(record, "/api/v0/nodes?detail=1&limit=1000")["data"]["result"]["result"]
    return [
        RayNode(node["node_id"], node["node_name"], node["resources_total"])
        for node in listed
        if node["state"] == "ALIVE"
    ]


def read_status(record: ClusterRecord) -> Status:
    """Raises `ClusterError` where the head is gone or does not answer."""
    if not record.nodes or find(record.nodes[0].process) is None:
        raise ClusterError(
            "the local cluster's head is gone, and with it the cluster; `dmd cluster up` starts a "
            "new one, `dmd cluster down` clears up what is left"
        )
    known = {node.name: node for node in alive_nodes(record)}
    reported = _get(record, "/api/cluster_status")["data"]["clusterStatus"] or {}  # not at first
    used = reported.get("loadMetricsReport", {}).get("usage", {})
    usage = {key: tuple(used.get(key, (0.0, 0.0))) for key in ("CPU", "GPU")}
    jobs = tuple(
        JobStatus(job["submission_id"] or job["job_id"], job["status"], job["entrypoint"])
        for job in _get(record, "/api/jobs/")
        if job["status"] in _ACTIVE
    )
    nodes = tuple(_node_status(node, known.get(node.name)) for node in record.nodes)
    return Status(record.url, nodes, usage, jobs)


def _node_status(node: NodeRecord, known: RayNode | None) -> NodeStatus:
    runs = find(node.process) is not None
    state = "gone" if not runs else "alive" if known else "joining"
    resources = known.resources if known and runs else {}
    cpus, gpus = (resources.get(key, 0.0) for key in ("CPU", "GPU"))
    return NodeStatus(node.name, state, node.ip, node.process.pid, cpus, gpus)


def _get(record: ClusterRecord, path: str) -> Any:
    secret = read_token(record)
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    with requests.Session() as session:
        session.trust_env = False  # no proxy stands between this machine and itself
        try:
            reply = session.get(record.url + path, headers=headers, timeout=_TIMEOUT_S)
            reply.raise_for_status()
            return reply.json()
        except (requests.RequestException, ValueError) as error:
            raise ClusterError(
                f"the local cluster at {record.url} does not answer ({error}); if it stays so, "
                "`dmd cluster down` and `dmd cluster up` start a new one"
            ) from error
