"""Ray Train as this project uses it: a worker group around a loop that keeps its own checkpoints.

What a restarted worker finds is decided by our checkpoints' markers alone; Ray Train's snapshot
is not used, so every start may have a fresh Ray run name and any Ray version may continue a run.
"""

import os
import uuid
from collections.abc import Callable
from typing import Any

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from pipelines.storage import Store


def run_worker_group(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    store: Store,
    num_workers: int,
    cpus_per_worker: float,
    use_gpu: bool,
    max_failures: int,
) -> None:
    """Run `loop(config)` on every worker until it returns; raises when it cannot be finished."""
    resources = {"CPU": cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    TorchTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=store.path("ray"),
            storage_filesystem=store.arrow,
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    ).fit()


def set_threads(threads: int | None) -> None:
    """Torch threads of this process. Ray sets OMP_NUM_THREADS=1 for one-CPU actors."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
