"""`dmd cluster`: a Ray cluster of several nodes on this machine, which behaves like a real one."""

import argparse
import shlex
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.local_cluster import LOOPBACK, LocalCluster
from cluster.local_status import Status
from cluster.nodes import Size, visible_gpus
from cluster.record import default_folder, read_record
from jobs.actions import add_action
from jobs.display import Display
from jobs.errors import Exit, JobError

_EXAMPLES = """examples:
  dmd cluster up                          a head that does no work and two workers of 2 CPUs
  dmd cluster up --nodes 5 --cpus 4       a head and four workers of 4 CPUs
  eval "$(dmd cluster env)"               lead this shell to the cluster
  dmd submit pairs --config demo --set run.dir=$PWD/runs/demo
  dmd cluster status
  dmd cluster down --node 2               kill worker 2, as a lost machine is; `up` brings it back
  dmd cluster down                        end the cluster; jobs that run end with it

Nodes are processes of this machine with CPUs that Ray counts but does not enforce. Jobs see the
environment that `up` was called with: set AWS_… and the like before it. Each request must carry a
secret token, which lies in a file that only you can read (--no-auth leaves it out)."""
_RANGES = {
    "nodes": (1, 32),
    "cpus": (1, 1024),
    "gpus": (0, 1024),
    "object_store_mb": (100, 1 << 20),
    "port": (1, 65535),
}
_LED_BY = "RAY_API_SERVER_ADDRESS RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH"  # what `env` sets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Actions of the verb, each with its own options."""
    parser.epilog = _EXAMPLES
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    up = _action(actions, "up", "start the cluster, or those of its nodes that are gone")
    up.add_argument(
        "--nodes",
        type=int,
        help="with the head, which does no work: 3 (default) are a head and two workers; "
        "1 is a single node that does both",
    )
    up.add_argument("--cpus", type=int, help="logical CPUs of each worker (default 2)")
    up.add_argument(
        "--gpus",
        type=int,
        help="GPUs of each worker, as Ray counts them (default 0); more in all than the machine "
        "has are only numbers",
    )
    up.add_argument(
        "--object-store-mb", type=int, metavar="MIB", help="per node (default 256, at least 100)"
    )
    up.add_argument(
        "--port", type=int, help="of dashboard and job server (default 8265, or another if taken)"
    )
    up.add_argument(
        "--dashboard-host",
        metavar="ADDRESS",
        help="where dashboard and job server listen (default 127.0.0.1: this machine only)",
    )
    up.add_argument(
        "--no-auth",
        dest="auth",
        action="store_const",
        const=False,
        help="let everybody in, without a token",
    )
    _action(actions, "status", "nodes, what is in use, jobs that run")
    _action(actions, "env", "the line for a shell that leads it to the cluster")
    down = _action(actions, "down", "end the cluster, or kill one of its workers")
    down.add_argument("--node", type=int, metavar="N", help="kill worker N alone, without warning")


def _action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser = add_action(actions, name, text, _EXAMPLES)
    parser.add_argument(
        "--dir",
        metavar="FOLDER",
        help=f"where the cluster is remembered (default {default_folder()}); each folder has one "
        "cluster of its own",
    )
    return parser


def run(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    """Do the action. Nothing to do is no error."""
    cluster = LocalCluster(
        options.dir,
        on_wait=lambda: display.say("cluster: another command is at work on it; waiting for that"),
    )
    return _ACTIONS[options.action](cluster, options, display)


def plan(options: argparse.Namespace, display: Display) -> dict[str, Any]:
    """What `run` would do; touches nothing."""
    cluster = LocalCluster(options.dir)
    record = read_record(cluster.folder)
    found = {"remembered in": str(cluster.folder), "now": record.url if record else "no cluster"}
    if options.action != "up":
        return found
    return found | {
        "wanted": _size(cluster, options).in_words,
        "listens at": options.dashboard_host,
    }


# ------------------------------------------------------------------------ actions


def _up(cluster: LocalCluster, options: argparse.Namespace, display: Display) -> dict[str, Any]:
    _check_installed()
    size = _size(cluster, options)
    _warn(options, display)
    _warn_of_gpus(size, display)
    display.say(f"cluster: {size.in_words}")
    began = time.monotonic()
    started = cluster.up(
        size,
        port=options.port,
        dashboard_host=options.dashboard_host,
        auth=options.auth,
    )
    if started:
        display.done(f"cluster: {', '.join(started)} started in {time.monotonic() - began:.0f} s")
    else:
        display.done(f"cluster: up already at {cluster.url}")
    run_dir = Path("runs/demo").absolute()
    display.say(
        f"dashboard and job server: {cluster.url}\nTo use it from a shell:\n  {_exports(cluster)}\n"
        f"  dmd submit pairs --config demo --set run.dir={shlex.quote(str(run_dir))}"
    )
    return {"started": started, **_result(cluster)}


def _status(cluster: LocalCluster, options: argparse.Namespace, display: Display) -> dict[str, Any]:
    if read_record(cluster.folder) is None:
        display.say("cluster: none; `dmd cluster up` starts one")
        return {"nodes": [], "jobs": [], "usage": {}, "url": None}
    status = cluster.status()
    if not options.json:
        _print(status)
    return asdict(status)


def _env(cluster: LocalCluster, options: argparse.Namespace, display: Display) -> dict[str, Any]:
    if not options.json:
        print(_exports(cluster))
    return cluster.client_environment


def _down(cluster: LocalCluster, options: argparse.Namespace, display: Display) -> dict[str, Any]:
    if options.node is not None:
        cluster.kill_node(options.node)
        display.done(f"cluster: worker-{options.node} killed; `dmd cluster up` starts it again")
        return {"killed": options.node}
    ended = cluster.down()
    logs = cluster.folder / "last-logs"
    display.done(f"cluster: ended; its logs: {logs}" if ended else "cluster: there is none")
    if ended:
        display.say(f"in a shell that was led to it:\n  unset {_LED_BY}")
    return {"ended": ended}


_ACTIONS = {"up": _up, "status": _status, "env": _env, "down": _down}


def _size(cluster: LocalCluster, options: argparse.Namespace) -> Size:
    """What was asked for, if it can be; the rest as the cluster has it, if there is one."""
    for key, (least, most) in _RANGES.items():
        value = getattr(options, key)
        if value is not None and not least <= value <= most:
            option = f"--{key.replace('_', '-')}"
            raise JobError(f"{option} {value}: expected {least} to {most}", Exit.USAGE)
    asked = {key: getattr(options, key) for key in ("nodes", "cpus", "gpus", "object_store_mb")}
    record = read_record(cluster.folder)
    has = record.size if record is not None else Size()
    return replace(has, **{key: value for key, value in asked.items() if value is not None})


def _check_installed() -> None:
    from ray._private.utils import get_dashboard_dependency_error

    missing = get_dashboard_dependency_error()
    if missing is not None:
        raise JobError(
            f"a cluster with a job server needs ray[default], of which a part is missing "
            f"({missing}); install it with: pip install -e '.[cluster]'"
        )


def _warn(options: argparse.Namespace, display: Display) -> None:
    host, token = options.dashboard_host or LOOPBACK[0], options.auth is not False
    if host not in LOOPBACK:
        display.say(
            f"warning: dashboard and job server will listen at {host}, not for this machine alone. "
            "Running whatever it is sent is what Ray's job server is for: who reaches the port "
            f"{'and has the token ' if token else ''}runs programs as you. Nothing is encrypted, "
            "the token neither. A tunnel is safer: leave the address as it is and call "
            "ssh -L 8265:127.0.0.1:8265 <this machine>"
        )
    if not token:
        display.say(
            "warning: without a token every user and every program of this machine can submit "
            "jobs, which run as you; and Ray's own ports (not the dashboard's) listen on all "
            "interfaces and let in whoever reaches them"
        )


def _warn_of_gpus(size: Size, display: Display) -> None:
    asked = size.working * size.gpus
    if asked and asked > (present := len(visible_gpus())):
        display.say(
            f"warning: Ray will count {asked} GPUs; NVIDIA's driver shows {present} to what is "
            "started here. The others are only numbers: nodes without GPUs of their own share "
            "the real ones, or work on CPUs without a word"
        )


def _exports(cluster: LocalCluster) -> str:
    """An old RAY_AUTH_TOKEN would come before the cluster's."""
    pairs = cluster.client_environment.items()
    exports = " ".join(f"{key}={shlex.quote(value)}" for key, value in pairs)
    return f"unset RAY_AUTH_TOKEN; export {exports}"


def _result(cluster: LocalCluster) -> dict[str, Any]:
    record = cluster.record
    return {
        "url": record.url,
        "environment": cluster.client_environment,
        "nodes": [node.name for node in record.nodes],
        "logs": record.place.root,
    }


def _print(status: Status) -> None:
    print(f"{status.url}")
    for node in status.nodes:
        gpus = f", {node.gpus:g} GPUs" if node.gpus else ""
        print(f"  {node.name:10} {node.state:8} {node.cpus:g} CPUs{gpus}   {node.ip or ''}")
    used = [f"{used:g} of {total:g} {key}s" for key, (used, total) in status.usage.items() if total]
    print(f"in use: {', '.join(used) or 'nothing'}")
    for job in status.jobs:
        print(f"  {job.state:8} {job.id}  {job.command}")
    if not status.jobs:
        print("no job runs")


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("cluster"))
