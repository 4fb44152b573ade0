"""A training as a process of its own on a small cluster, to be killed, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from fsspec.implementations.local import LocalFileSystem

from dmd_core.checkpoint import Checkpoint, committed_steps, load_checkpoint

PATIENCE_S = 240
RATE = 1e-5
FS = LocalFileSystem()
_OBJECT_STORE = 128 << 20
# How often Ray Train asks whether its workers live and whether their nodes are to go, and how long
# it waits for the place of a group that it believes to be there (after a node died: in vain).
_ENVIRONMENT = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
}


def chaos_settings(cluster, teacher: str, folder: Path, *, steps: int) -> dict[str, object]:
    """Of an elastic training whose steps are slow enough to be hit."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {index}" for index in range(12)))
    return {
        "teacher.path": teacher, "pairs.prompts": prompts, "ray.address": cluster.address,
        "train.num_workers": "{min: 1, max: 2}", "train.max_failures": 50,
        "train.lambda_reg": 0, "train.train_batch_size": 64, "train.learning_rate": RATE,
        "train.max_train_steps": steps, "train.checkpointing_steps": 5,
        "train.checkpoints_total_limit": 3, "train.validation_steps": 10_000,
        "train.report_to": "none",
    }  # fmt: skip


@dataclass
class TrainingRun:
    """`dmd train --config tiny --set …` in `folder`; what it and its Ray say goes to log files.

    The driver alone is a child of this process: its workers are below the raylets of a cluster.
    """

    settings: dict[str, object]
    folder: Path
    process: subprocess.Popen | None = None

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.chaos.training_driver", "--config", "tiny"]
        for key, value in {"run.dir": self.folder, **self.settings}.items():
            command += ["--set", f"{key}={value}"]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [*command, "--json"],
                cwd=Path(__file__).parents[2],
                env=os.environ | _ENVIRONMENT,
                start_new_session=True,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """SIGKILL for the driver alone."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self.process = None

    def wait(self) -> int:
        """The exit code."""
        assert self.process is not None
        code, self.process = self.process.wait(PATIENCE_S), None
        return code

    def finish(self) -> None:
        if self.process is None:
            self.start()
        assert self.wait() == 0, self.said()

    def wait_until(self, reached: Callable[[], bool], what: str) -> None:
        """Raises if the driver ends, or patience does, before it."""
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            assert self.process.poll() is None, f"ended before {what}: {self.said()}"
            assert time.monotonic() < deadline, f"not reached: {what}: {self.said()}"
            time.sleep(0.02)

    def said(self) -> str:
        ray = self.folder / "logs" / "ray.log"
        tail = ray.read_text()[-2000:] if ray.exists() else ""
        return f"{self.log.read_text()[-2000:]}\n--- ray.log\n{tail}"

    # ------------------------------------------------------------ what is on disk

    @property
    def checkpoints(self) -> str:
        return str(self.folder / "checkpoints")

    def committed_steps(self) -> list[int]:
        """Empty also when a folder went away during the look."""
        with suppress(FileNotFoundError):
            return committed_steps(FS, self.checkpoints)
        return []

    def newest_step(self) -> int:
        """Of a complete checkpoint; 0: there is none."""
        return max(self.committed_steps(), default=0)

    def lines(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        return metric_lines(path.read_bytes()) if path.exists() else []

    def whole(self, steps: int) -> Checkpoint:
        """The last checkpoint of a run that ended at `steps`; every one is loaded and verified,
        nothing half-written is left, and each step has one line."""
        assert [line["step"] for line in self.lines()] == list(range(1, steps + 1))
        committed = committed_steps(FS, self.checkpoints)
        assert committed and committed[-1] == steps
        found = [load_checkpoint(FS, self.checkpoints, step) for step in committed]
        assert [each.step for each in found if each is not None] == committed
        names = sorted(path.name for path in Path(self.checkpoints).iterdir())
        assert names == [f"checkpoint-{step:08d}" for step in committed]
        assert not list(Path(self.checkpoints).rglob("*.tmp"))
        final = found[-1]
        assert final is not None and final.state["finished"]
        return final


def metric_lines(raw: bytes) -> list[dict]:
    return [json.loads(line) for line in raw.splitlines()]


def assert_same_training(found: TrainingRun, expected: TrainingRun, steps: int) -> None:
    """Equal to float32 rounding: other groups of workers add in another order. Adam makes of the
    rounding of a gradient that is zero a step of its own, so parameters are compared as a whole;
    one step more or less moves them by about the learning rate."""
    ours, theirs = found.whole(steps), expected.whole(steps)
    assert ours.state["progress"] == theirs.state["progress"]
    keys = ("loss_dm", "loss_fake", "sample_mean", "sample_std")
    for line, other in zip(found.lines(), expected.lines(), strict=True):
        for key in keys:
            assert abs(line[key] - other[key]) <= 1e-3 * max(1.0, abs(other[key])), (line, other)
    for part in ("generator", "fake"):
        drift = distance(ours, theirs, part)
        print(f"{part}: differs by {drift:.2e}")
        assert drift <= 0.01 * RATE, f"{part} differs by {drift} (root mean square)"


def distance(one: Checkpoint, other: Checkpoint, part: str) -> float:
    """Root mean square over all numbers of a part."""
    assert one.parts[part].keys() == other.parts[part].keys()
    total = sum(
        float((value.double() - other.parts[part][name].double()).square().sum())
        for name, value in one.parts[part].items()
    )
    return (total / sum(value.numel() for value in one.parts[part].values())) ** 0.5


# ---------------------------------------------------------------- the cluster


@contextmanager
def small_cluster(nodes: int) -> Iterator[object]:
    """A head without CPUs, which is the driver's node, and nodes for one worker each."""
    from ray.cluster_utils import Cluster

    args = {"num_cpus": 0, "object_store_memory": _OBJECT_STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=args)
    try:
        for _ in range(nodes):
            add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster, workers: int = 1) -> None:
    cluster.add_node(num_cpus=workers, object_store_memory=_OBJECT_STORE)


def announce_preemption(cluster, node, seconds: float) -> None:
    """As a cloud would: the node will be taken away after this time."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    accepted, why = GcsClient(address=cluster.gcs_address).drain_node(
        node.node_id,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "",
        int((time.time() + seconds) * 1000),
    )
    assert accepted, why


def train_workers(node) -> list[psutil.Process]:
    """Of a node: below its raylet, with the actor in their title."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    found = []
    for process in raylet.children(recursive=True):
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def all_workers(cluster) -> list[psutil.Process]:
    return [worker for node in cluster.worker_nodes for worker in train_workers(node)]
