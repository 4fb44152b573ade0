"""A training loop that trains nothing, saves checkpoints and is evaluated beside it."""

import json
import time
from pathlib import Path
from typing import Any

import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer

from dmd_core.checkpoint import Checkpoint, committed_steps, save_checkpoint
from dmd_core.teacher import load_teacher
from pipelines.beside import Beside, validation_config
from pipelines.beside_task import EvaluationTask
from pipelines.storage import Store

EVENTS = "events.json"


def save_student(task: EvaluationTask, step: int, **state: Any) -> None:
    """A checkpoint whose student is the untrained one: the teacher's own network."""
    generator = dict(load_teacher(task.teacher).pipeline.unet.state_dict())
    store = task.store()
    root = store.path("checkpoints")
    save_checkpoint(store.fs, root, Checkpoint(step, {"generator": generator}, state), alone=True)


def loop(config: dict[str, Any]) -> None:
    """Save at step 2, let the marker appear at step 4, and go on until `most_steps` or, if there is
    one, until the result of step 2; then save the last checkpoint and leave."""
    task = EvaluationTask(**config["task"])
    rank, store = ray.train.get_context().get_world_rank(), task.store()
    beside = Beside(task, store, rank=rank, share=broadcast_from_rank_zero)
    beside.resume(0)
    events: list[dict[str, Any]] = []
    step, heard = 0, False
    while step < config["most_steps"] and not heard:
        step += 1
        time.sleep(0.1)
        if step == 2:
            beside.saving(step)
        if step == 4 and rank == 0:
            save_student(task, 2)
            if config["corrupt"]:
                _damage(store, 2)
        news = beside.advance()
        heard = any(found.step == 2 for found in news.results)
        events.append(
            {
                "step": step,
                "markers": committed_steps(store.fs, store.path("checkpoints")),
                "running": list(beside._running),
                "results": [[found.step, found.error] for found in news.results],
                "stop": news.stop,
            }
        )
    if rank == 0:
        save_student(task, step)
    beside.saving(step, finished=True)
    events.append({"step": step, "last": True, "seconds": time.time()})
    beside.advance()
    Path(store.path(f"rank{rank}-{EVENTS}")).write_text(json.dumps(events))


def _damage(store: Store, step: int) -> None:
    for file in Path(store.path("checkpoints", f"checkpoint-{step:08d}")).glob("gen*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\x55")


def fit(task: EvaluationTask, *, cpus_per_worker: float, **config: Any) -> list[list[dict]]:
    """Two workers run `loop`; returns what each wrote down."""
    store = task.store()
    defaults = {"most_steps": 600, "corrupt": False, "task": task.__dict__}
    TorchTrainer(
        loop,
        train_loop_config=defaults | config,
        scaling_config=ScalingConfig(
            num_workers=2, use_gpu=False, resources_per_worker={"CPU": cpus_per_worker}
        ),
        run_config=RunConfig(
            name="beside", storage_path=store.path("ray"), storage_filesystem=store.arrow
        ),
        validation_config=validation_config(task),
    ).fit()
    return [json.loads(Path(store.path(f"rank{rank}-{EVENTS}")).read_text()) for rank in (0, 1)]
