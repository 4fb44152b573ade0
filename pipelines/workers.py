"""Ray Train as this project uses it: a worker group around a loop that keeps its own checkpoints.

What a restarted worker finds is decided by our checkpoints' markers alone; Ray Train's snapshot
is not used, so every start may have a fresh Ray run name and any Ray version may continue a run.
"""

import logging
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import ray
import ray.train
import torch
from ray.train import (
    FailureConfig,
    RunConfig,
    ScalingConfig,
    ValidationConfig,
    WorkerGroupError,
)
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer

from pipelines.computing import prepare_computing
from pipelines.device import worker_device
from pipelines.placement import GroupPlacementSection
from pipelines.progress import warnings_passed
from pipelines.storage import Store

T = TypeVar("T")
_logger = logging.getLogger(__name__)
_RESIZE_CHECK_S = 30.0  # how often an elastic group looks for more room


@dataclass(frozen=True)
class Group:
    """This worker of the group that Ray Train has started. `nearby`: workers on its node."""

    rank: int
    size: int
    nearby: int = 1

    @staticmethod
    def here() -> "Group":
        context = ray.train.get_context()
        return Group(
            context.get_world_rank(), context.get_world_size(), context.get_local_world_size()
        )

    def prepare_computing(self, threads: int | None) -> None:
        """`prepare_computing`, beside the other workers of the node."""
        prepare_computing(threads, self.nearby)

    def device(self, use_gpu: bool) -> torch.device:
        """That Ray Train gave this worker. Raises `DeviceError`."""
        on_gpu = worker_device(use_gpu) == "cuda"
        return ray.train.torch.get_device() if on_gpu else torch.device("cpu")

    def share(self, value: T) -> T:
        """Rank 0's value, on every worker."""
        return value if self.size == 1 else broadcast_from_rank_zero(value)

    def count(self, found: bool, device: torch.device) -> int:
        """Of how many workers that is true, on every worker."""
        total = torch.tensor(int(found), device=device)
        if self.size > 1:
            torch.distributed.all_reduce(total)
        return int(total)

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every worker; what it raises of ours, too: else the
        others would wait for a worker that is gone."""
        found: tuple[Any, Exception | None] = None, None
        if self.rank == 0:
            try:
                found = make(), None
            except RuntimeError as error:
                found = None, error
        value, error = self.share(found)
        if error is not None:
            raise error
        return cast(T, value)


def run_worker_group(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    store: Store,
    num_workers: int | tuple[int, int],
    cpus_per_worker: float,
    use_gpu: bool,
    max_failures: int,
    stored: Callable[[], Any],
    placement: GroupPlacementSection | None = None,
    validation: ValidationConfig | None = None,
) -> None:
    """Run `loop(config)` on every worker until it returns; raises when it cannot be finished.
    What workers warn of goes to the `board` in `config`, if there is one.

    `num_workers` (least, most): elastic. The loop starts again from its checkpoint whenever the
    group changes; `max_failures` does not count the loss of a preempted node.

    `stored`: what of the work is on the store. Where there is more of it than before, failures are
    counted anew: in weeks, many machines may fail, and each costs only what was not stored yet.
    """
    resources = {"CPU": cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    trainer = partial(
        TorchTrainer,
        partial(_with_warnings_shown, loop),
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=_RESIZE_CHECK_S,
            **(placement or GroupPlacementSection()).options(),
        ),
        validation_config=validation,
    )
    while True:
        before = stored()
        run = RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=store.path("ray"),
            storage_filesystem=store.arrow,
            failure_config=FailureConfig(max_failures=max_failures),
        )
        try:
            with _interruptible():
                trainer(run_config=run).fit()
            return
        except WorkerGroupError as error:
            if stored() == before:
                raise
            _logger.warning(
                "workers failed, but came further; they are started again: %s",
                last_line(error),
                exc_info=error,
            )


def last_line(error: Exception) -> str:
    """Of what a worker raised, without the way there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _with_warnings_shown(loop: Callable[[dict[str, Any]], None], config: dict[str, Any]) -> None:
    board = config.get("board")
    if board is None:
        return loop(config)
    with warnings_passed(board.warn.remote):
        return loop(config)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C in the block is a `KeyboardInterrupt`, once Ray Train has ended the run for it, and
    after the block, too: Ray Train's own handler ends the process and is left in place for good."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if stop.code not in (None, 0, 1):  # SIGTERM, to Ray's other handler
            raise
        raise KeyboardInterrupt from stop
    finally:
        signal.signal(signal.SIGINT, before)


def workers_per_machine(count: int) -> int:
    """Of so many workers, spread evenly over the cluster, how many a machine has at most."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    machines = {node["NodeManagerHostname"] for node in nodes}  # a head without CPUs has no workers
    return -(-count // max(1, len(machines)))
