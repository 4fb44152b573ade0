"""One node of a Ray cluster on this machine: the command that runs it, and what it inherits."""

import os
import random
import secrets
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.processes import Birth, spawn

MARK = "DMD_CLUSTER_ROOT"  # in the environment of every process of a cluster: its folder
HEAD = "head"
DEFAULT_PORT = 8265

# What would lead a node to another Ray or give it another Ray's token.
_FOREIGN = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_NAMESPACE",
    "RAY_REDIS_ADDRESS",
    "RAY_RUNTIME_ENV_HOOK",
    "RAY_START_HOOK",
    "RAY_TMPDIR",
)
# Below the ports that systems hand out for outgoing connections, and Ray to its workers.
_PORTS = range(20_000, 30_000)


class ClusterError(RuntimeError):
    """A local cluster that cannot be started, found or changed as it was asked for."""


@dataclass(frozen=True)
class Size:
    """`nodes` counts the head, which does no work unless it is alone.

    `cpus` and `gpus`: logical ones of each node that works; `object_store_mb`: MiB per node.
    """

    nodes: int = 3
    cpus: int = 2
    gpus: int = 0
    object_store_mb: int = 256

    @property
    def working(self) -> int:
        """Nodes that do work."""
        return max(1, self.nodes - 1)

    @property
    def in_words(self) -> str:
        """`3 nodes: a head that does no work, 2 workers with 2 CPUs each`."""
        each = f"{self.cpus} CPU{'s' * (self.cpus != 1)}"
        if self.gpus:
            each += f" and {self.gpus} GPU{'s' * (self.gpus != 1)}"
        if self.nodes == 1:
            return f"1 node with {each}"
        workers = self.nodes - 1
        of_workers = f"{workers} worker{'s' * (workers != 1)} with {each}"
        ending = " each" if workers > 1 else ""
        return f"{self.nodes} nodes: a head that does no work, {of_workers}{ending}"


@dataclass(frozen=True)
class NodeRecord:
    """A node that was started. `ip` of None: the one that Ray finds (not on Linux)."""

    name: str
    ip: str | None
    process: Birth


@dataclass(frozen=True)
class Place:
    """What all nodes of a cluster share. `root`: Ray's files; `gcs_port`: where nodes meet.

    `token`: path of the file with the secret that every request must carry; None: no secret.
    """

    root: str
    gcs_port: int
    token: str | None


def start_head(
    place: Place, size: Size, *, dashboard_host: str, dashboard_port: int, tied: bool
) -> NodeRecord:
    """Start the head with dashboard and job server; returns before it answers."""
    works = size.nodes == 1
    return _start(
        place,
        HEAD,
        0,
        [
            *("--head", f"--port={place.gcs_port}", f"--ray-client-server-port={free_port()}"),
            *("--include-dashboard=true", f"--dashboard-host={dashboard_host}"),
            *(f"--dashboard-port={dashboard_port}", *_resources(size, works=works)),
        ],
        tied=tied,
        gpus=_own_gpus(0, size.gpus) if works else None,
    )


def start_worker(place: Place, size: Size, index: int, *, tied: bool) -> NodeRecord:
    """Start worker `index` (from 1) of a cluster whose head answers."""
    address = f"{node_ip(0) or '127.0.0.1'}:{place.gcs_port}"
    return _start(
        place,
        worker_name(index),
        index,
        # One reader of logs per machine is enough; it follows the head's.
        [f"--address={address}", *_resources(size, works=True)],
        tied=tied,
        gpus=_own_gpus(index - 1, size.gpus),
    )


def worker_name(index: int) -> str:
    return f"worker-{index}"


def node_ip(index: int) -> str | None:
    """A loopback address per node, so that nodes differ as machines do.

    Ray replaces 127.0.0.1 by the machine's own address, which a laptop loses with its network.
    """
    return f"127.0.0.{2 + index}" if sys.platform == "linux" else None


def client_environment(url: str, token: str | None) -> dict[str, str]:
    """What a program needs in its environment to reach the job server."""
    auth = {"RAY_AUTH_MODE": "disabled"}
    if token is not None:
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
    return {"RAY_API_SERVER_ADDRESS": url, **auth}


def node_environment(place: Place, base: Mapping[str, str]) -> dict[str, str]:
    """`base`, which jobs inherit, credentials included, without what belongs to another Ray."""
    environment = {key: value for key, value in base.items() if key not in _FOREIGN}
    environment |= client_environment("", place.token)
    del environment["RAY_API_SERVER_ADDRESS"]
    environment |= {
        MARK: place.root,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        # The `python` of a job's command is the one that has this package.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", os.defpath)]),
    }
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return environment


def new_token(path: Path) -> None:
    """Write a fresh secret where only this user can read it."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def free_port() -> int:
    for port in random.SystemRandom().sample(_PORTS, 200):
        if is_free(port):
            return port
    raise ClusterError(f"no free port was found between {_PORTS.start} and {_PORTS.stop}")


def is_free(port: int, host: str = "") -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def visible_gpus() -> list[str]:
    """The real GPUs that programs started here may use, as in CUDA_VISIBLE_DEVICES."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager as Manager

    visible = Manager.get_current_process_visible_accelerator_ids()
    if visible is None:
        visible = [str(i) for i in range(Manager.get_current_node_num_accelerators())]
    return visible


def output_file(root: str, name: str) -> Path:
    """What the command that runs a node says."""
    return Path(root) / f"{name}.out"


def _start(
    place: Place, name: str, index: int, options: list[str], *, tied: bool, gpus: str | None
) -> NodeRecord:
    """`ray start --block` stays as the parent of the node's processes and ends with them."""
    ip = node_ip(index)
    folder = Path(place.root) / name  # of its own: nodes that share one race for socket names
    folder.mkdir(mode=0o700, exist_ok=True)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--log-style=record"),
        *(f"--node-name={name}", f"--temp-dir={folder}", "--disable-usage-stats"),
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
        *([f"--node-ip-address={ip}"] if ip else []),
        *options,
    ]
    environment = node_environment(place, os.environ)
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    elif any(option.startswith("--num-gpus=") and option[-2:] != "=0" for option in options):
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    output = str(output_file(place.root, name))
    process = spawn(command, environment=environment, folder=place.root, output=output, tied=tied)
    return NodeRecord(name, ip, process)


def _resources(size: Size, *, works: bool) -> list[str]:
    return [
        f"--num-cpus={size.cpus if works else 0}",
        f"--num-gpus={size.gpus if works else 0}",
        f"--object-store-memory={size.object_store_mb << 20}",
    ]


def _own_gpus(index: int, count: int) -> str | None:
    """The real GPUs of the index-th node that works: every raylet counts from 0, so that two
    would share the first. None: fewer real ones than that; they are only numbers to Ray."""
    if count == 0:
        return None
    own = visible_gpus()[index * count : (index + 1) * count]
    return ",".join(own) if len(own) == count else None
