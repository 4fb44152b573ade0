"""`dmd doctor` on the Ray cluster: is it there, of this version, and has it room for the work?"""

import os
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

from cluster.job_server import SubmitError
from cluster.nodes import ClusterError
from cluster.secrets import without_user_info
from jobs.config import Recipe
from jobs.doctor_checks import Check, one_line
from jobs.job_client import connect, known_address
from jobs.placement import (
    DATA_CPUS,
    evaluate_demand,
    is_embedded,
    pairs_demand,
    too_full,
    train_demand,
)
from jobs.quiet import redirected_output
from pipelines.placement import Demand, NodeFacts, living_nodes, room_for, unmet

_CONNECT_SECONDS = 5
_SAME = "install the cluster's Ray here (constraints.txt), or update the cluster"


def check_cluster(recipe: Recipe, address: str | None) -> list[Check]:
    """`address`: a job server (http://…) or a cluster (host:port, auto) in place of the recipe's
    and the environment's; None: theirs."""
    address = address or recipe.ray.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        return [Check("cluster", "skip", "no address: Ray is started on this machine"),
                *_embedded(recipe), *_beside()]  # fmt: skip
    if address.startswith(("http://", "https://")):
        return [_job_server(address)]
    return _inside(recipe, address)


def _job_server(address: str) -> Check:
    import ray

    shown = without_user_info(address)
    try:
        found = connect(address).ray_version
    except (SubmitError, ClusterError) as error:
        return Check("cluster", "fail", one_line(error), "correct --address; is its port open?")
    except ImportError as error:
        return Check("cluster", "fail", one_line(error), "pip install -e '.[cluster]'")
    if found != ray.__version__:
        return Check("cluster", "fail", f"Ray {found} at {shown}, {ray.__version__} here", _SAME)
    return Check(
        "cluster", "ok", f"Ray {found} at {shown}, as here",
        "its nodes are checked from inside: dmd submit doctor --config …",
    )  # fmt: skip


def _beside() -> list[Check]:
    """The job server that `dmd submit` finds by itself. What runs here does without it."""
    address = known_address(None)
    if address is None:
        return []
    check = _job_server(address)
    return [replace(check, name="job server", status="ok" if check.status == "ok" else "warn")]


def _inside(recipe: Recipe, address: str) -> list[Check]:
    """Join the cluster as a driver for a moment; Ray compares versions itself."""
    import ray

    dead = _dead(address)
    if dead:
        return [Check("cluster", "fail", dead, "correct --address or ray.address")]
    with tempfile.TemporaryDirectory(prefix="dmd-doctor-") as folder:
        with redirected_output(str(Path(folder) / "ray.log")):
            try:
                ray.init(address, log_to_driver=False, configure_logging=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                return [Check("cluster", "fail", f"{address}: {one_line(error)}", _why_not())]
            try:
                nodes = living_nodes(ray.nodes())
            finally:
                ray.shutdown()
    total = {n: sum(node.resources.get(n, 0.0) for node in nodes) for n in ("CPU", "GPU")}
    found = f"Ray {ray.__version__} at {address}, as here: {len(nodes)} nodes, "
    found += f"{total['CPU']:g} CPUs, {total['GPU']:g} GPUs"
    return [Check("cluster", "ok", found), *placement(recipe, nodes)]


def placement(recipe: Recipe, nodes: list[NodeFacts]) -> list[Check]:
    """Has a cluster of these nodes room for teachers, training workers and evaluation actors?"""
    return [
        _room(recipe, demand, nodes, spare)
        for demand, spare in (
            (pairs_demand(recipe), DATA_CPUS),
            (train_demand(recipe), 0.0),
            (evaluate_demand(recipe), DATA_CPUS),
        )
    ]


def _room(recipe: Recipe, demand: Demand, nodes: list[NodeFacts], spare: float) -> Check:
    name = f"room: {demand.what}"
    why = unmet(demand, nodes) or too_full(demand, nodes, spare)
    if not why:
        room = room_for(demand, nodes)
        enough = room >= demand.count
        found = f"for {min(room, demand.count)} of {demand.count} ({demand.in_words()} each)"
        return Check(name, "ok" if enough else "warn", found)
    starts = False if is_embedded(recipe) else recipe.ray.autoscaling
    advice = f"change {demand.key}, or add such a node"
    if starts:
        return Check(name, "warn", f"{why}; ray.autoscaling says that such nodes are started")
    return Check(name, "fail", why, advice)


def _embedded(recipe: Recipe) -> list[Check]:
    """The Ray that verbs would start here has the CPUs that the recipe says, and real GPUs."""
    import torch

    resources = {"CPU": float(recipe.ray.num_cpus), "GPU": float(torch.cuda.device_count())}
    return placement(recipe, [NodeFacts(resources, {})])


def _dead(address: str) -> str:
    """Why nothing can be reached there; "": something listens. Ray itself tries for a minute."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit():
        return ""  # auto, local
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        return f"{address} does not answer: {one_line(error)}"
    return ""


def _why_not() -> str:
    return f"a driver runs on a node of its cluster; from elsewhere give the job server. {_SAME}"
