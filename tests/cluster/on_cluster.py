"""A user's terminal beside a local cluster, and what is seen of the jobs from outside."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import psutil
import pyarrow.parquet as pq

from cluster.local_cluster import LocalCluster
from cluster.processes import family

ROOT = Path(__file__).parents[2]
PATIENCE_S = 420


@dataclass
class Terminal:
    """A shell in the repository that was led to the cluster. It has no credentials of a store."""

    cluster: LocalCluster
    folder: Path
    commands: list["Command"] = field(default_factory=list)

    def ray_submit(self, verb: str, settings: dict[str, object]) -> "Command":
        """Ray's own command line, which stays until the job has ended."""
        line = ["ray", "job", "submit", "--working-dir", ".", "--runtime-env"]
        line += ["cluster/runtime_env.yaml", "--", "python", "-m", f"jobs.{verb}"]
        return self.start(*line, *arguments(settings))

    def dmd(self, *words: object) -> "Command":
        return self.start("dmd", *map(str, words))

    def start(self, program: str, *words: str) -> "Command":
        log = self.folder / f"{len(self.commands)}.log"
        environment = {k: v for k, v in self.cluster.environment.items() if not k.startswith("AWS")}
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [str(Path(sys.executable).parent / program), *words],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.commands.append(Command(process, log))
        return self.commands[-1]

    def close(self) -> None:
        for command in self.commands:
            command.kill()


@dataclass
class Command:
    process: subprocess.Popen
    log: Path

    def finish(self) -> str:
        """What it said. It must end well."""
        code = self.process.wait(PATIENCE_S)
        assert code == 0, f"exit code {code}: {self.said[-4000:]}"
        return self.said

    def wait_until(self, reached: Callable[[], object], what: str) -> None:
        """Raises if the command ends, or patience does, before it."""
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            assert self.process.poll() is None, f"ended before {what}: {self.said[-4000:]}"
            assert time.monotonic() < deadline, f"not reached: {what}: {self.said[-4000:]}"
            time.sleep(0.05)

    def kill(self) -> None:
        """As when the terminal's window is shot: the command and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")


def arguments(settings: dict[str, object]) -> list[str]:
    found = ["--config", "tiny"]
    for key, value in settings.items():
        found += ["--set", f"{key}={value}"]
    return found


def nodes_with(cluster: LocalCluster, title: str) -> list[int]:
    """The workers (their numbers) with a process of Ray whose title has `title` in it."""
    found = []
    for node in cluster.record.nodes[1:]:
        if any(title in _title(process) for process in family(node.process)):
            found.append(int(node.name.rsplit("-", 1)[1]))
    return found


def kill_node_with(cluster: LocalCluster, title: str) -> int:
    """Kill a worker where such a process runs; returns its number."""
    victims = nodes_with(cluster, title)
    assert victims, f"no worker has a process {title!r}"
    cluster.kill_node(victims[0])
    return victims[0]


def committed_rows(root: Path) -> int:
    """Rows of the pair data set in `root` that its ledgers say are written."""
    entries = root.glob("generations/*/ledger/*.parquet")
    names = [entry for entry in entries if not entry.name.endswith(".pending.parquet")]
    return sum(pq.read_metadata(name).num_rows for name in names)


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def holding(everything: Mapping[str, bytes], secret: str) -> list[str]:
    """Names of what holds the secret as it is, or as URLs, JSON or base64 would write it."""
    forms = {secret, quote(secret, safe=""), json.dumps(secret)[1:-1]}
    encoded = {form.encode() for form in forms} | {base64.b64encode(secret.encode())[:-4]}
    return [name for name, data in everything.items() if any(form in data for form in encoded)]
