"""`dmd train`'s own loop in real processes that gloo joins, where Ray would join them.

Of the loop only what Ray gives is replaced: rank and size, the value that rank 0 shares, the report
at the end. One helper process imports everything once and forks every worker: `python -m` this
module, orders as JSON lines on stdin, the workers' exit codes on stdout.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray.train
import safetensors.torch
import torch
import torch.distributed as dist

from dmd_core import networks
from dmd_core.checkpoint import MARKER, Tensors, checkpoint_path
from dmd_core.parallel import whole
from dmd_core.step_types import StepData
from pipelines import training
from pipelines.config import PairsSection, StorageSection
from pipelines.manifest import load_manifest
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import open_store
from pipelines.workers import Group

PAIRS = PairsSection(steps=4, guidance_scale=2.0, batch_size=8, rows_per_block=8)
_SEED, _LIMIT_S = 7, 300.0


@dataclass(frozen=True)
class Death:
    """A worker's end once checkpoint `step` is complete; with `torn`, while that part of it is half
    written and the training goes on. `kill`: of `rank` (the others are killed for it, as any group
    of workers ends with one of them); `interrupt`: Ctrl-C, which all of them hear."""

    step: int
    torn: str = ""
    how: Literal["kill", "interrupt"] = "kill"
    rank: int = 0


@dataclass(frozen=True)
class Order:
    """One start of the loop on `size` workers, of the data set in `root`."""

    folder: str
    teacher: str
    root: str
    train: dict[str, Any]
    size: int = 1
    death: Death | None = None

    @property
    def config(self) -> dict[str, Any]:
        """As `train_loop` takes it; the first sealed version is pinned."""
        manifest = load_manifest(open_store(self.root), 1)
        return {
            "train": _DEFAULTS | self.train, "pairs": PAIRS.model_dump(), "seed": _SEED,
            "storage": StorageSection().model_dump(), "dir": self.folder, "root": self.root,
            "teacher": self.teacher, "pins": {"default": 1, "versions": {1: manifest.digest}},
            "fence": 0,  # nobody has taken a lease
        }  # fmt: skip


_DEFAULTS: dict[str, Any] = {
    "threads_per_worker": 1, "train_batch_size": 5, "regression_batch_size": 4,
    "learning_rate": 1e-4, "lr_warmup_steps": 2, "checkpointing_steps": 1, "logging_steps": 1,
    "checkpoints_total_limit": 100, "validation_steps": 1000, "num_validation_images": 1,
    "report_to": "none",
}  # fmt: skip


# ------------------------------------------------------------------ what a run leaves


@dataclass(frozen=True)
class Outcome:
    """`codes`: exit codes by rank; `seen`: what each worker saw of each step that it took, as far
    as it came; `begun`, `live`: whole tensors before the first and after the last of them, as they
    lie in the networks and optimizers, not as a checkpoint has them."""

    codes: list[int | None]
    said: str
    seen: list[dict[int, dict[str, list[str]]]] = field(default_factory=list)
    begun: dict[str, Tensors] = field(default_factory=dict)
    live: dict[str, Tensors] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        """Those that began in this start."""
        return sorted(self.seen[0]) if self.seen else []


def samples_of(outcome: Outcome) -> dict[int, dict[str, list[str]]]:
    """Hashes of every sample of each step that all workers began, as the global batch has them."""
    shared = set.intersection(*(set(seen) for seen in outcome.seen))
    return {
        step: {
            name: [row for seen in outcome.seen for row in seen[step][name]]
            for name in outcome.seen[0][step]
        }
        for step in sorted(shared)
    }


# ------------------------------------------------------------------ the helper process


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    context = multiprocessing.get_context("fork")
    for line in sys.stdin:
        given, out = json.loads(line)
        order = Order(**(given | {"death": Death(**given["death"]) if given["death"] else None}))
        group = [
            context.Process(target=_worker, args=(rank, order, Path(out)))
            for rank in range(order.size)
        ]
        for worker in group:
            worker.start()
        deadline = time.monotonic() + _LIMIT_S
        while any(w.exitcode is None for w in group) and time.monotonic() < deadline:
            if any((w.exitcode or 0) < 0 for w in group):
                break  # the others would wait for it
            time.sleep(0.01)
        codes = [worker.exitcode for worker in group]
        for worker in group:
            worker.kill()
            worker.join()
        replies.write(json.dumps(codes) + "\n")
        replies.flush()


# ------------------------------------------------------------------ one worker


@dataclass(frozen=True)
class _GlooGroup(Group):
    def share(self, value: Any) -> Any:
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def _worker(rank: int, order: Order, out: Path) -> None:
    log = os.open(out / f"log-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # A shell ignores it in what it starts in the background, and so would we.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if order.size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=order.size
        )
    run: Any = training
    run.Group.here = staticmethod(lambda: _GlooGroup(rank, order.size))
    end = _End(order, rank)
    ray.train.report = lambda metrics: end.reached(metrics["step"])
    ray.train.get_preemption_info = lambda: None
    this = run._DmdRun(order.config)
    step = this.trainer.step

    def watched(data: StepData, factor: float) -> Any:
        end.reached(this.progress.step)
        with open(out / f"seen-{rank}", "a") as seen:
            seen.write(json.dumps([this.progress.step, _hashes(data)]) + "\n")
        return step(data, factor)

    def keep(name: str) -> None:
        live = _live(this.networks)
        if rank == 0:
            end.write(live, out / name)

    def begin() -> None:
        real_begin()
        keep("begun")

    real_begin, this._begin, this.trainer.step = this._begin, begin, watched
    this.run()
    keep("live")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class _End:
    """Watches for the moment of an order's `Death`."""

    def __init__(self, order: Order, rank: int) -> None:
        self._death, self._rank = order.death, rank
        self._at_next = threading.Event()  # the loop has gone on to the step after the save
        self._store = open_store(order.folder)
        self.write = safetensors.torch.save_file
        if self._death is not None and self._death.torn:
            safetensors.torch.save_file = self._tear

    def reached(self, step: int) -> None:
        """The loop stands before the step after `step`, or at its end."""
        if self._death is None or step < self._death.step:
            return
        self._at_next.set()
        if not self._death.torn and self._rank == self._death.rank:
            folder = checkpoint_path(self._store.path(CHECKPOINTS), self._death.step)
            while not os.path.exists(f"{folder}/{MARKER}"):
                time.sleep(0.002)
            os.kill(os.getpid(), signal.SIGKILL)

    def _tear(self, tensors: Tensors, path: Any) -> None:
        """In place of safetensors' own, in the thread that saves."""
        death, real = self._death, self.write
        assert death is not None
        folder = checkpoint_path(self._store.path(CHECKPOINTS), death.step)
        hit = death.how == "interrupt" or self._rank == death.rank
        if not hit or not str(path).startswith(f"{folder}/{death.torn}-"):
            return real(tensors, path)
        self._at_next.wait(1.0)  # the last save is waited for: there is no next step
        if death.how == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            return real(tensors, path)
        real(tensors, path)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def _hashes(data: StepData) -> dict[str, list[str]]:
    """Of every sample: its noises, its times, its conditions, its pictures."""
    found: dict[str, list[str]] = {}
    for update, part in enumerate(data.unpaired):
        noise, pictures = part.noise, part.pictures
        fresh, scored = len(noise.z[0]), len(noise.eps_fake)
        tensors: dict[str, torch.Tensor | None] = {f"z{k}": z for k, z in enumerate(noise.z)}
        for name in ("eps_dm", "u_dm", "eps_fake", "u_fake", "eps_gan", "u_gan"):
            value = getattr(noise, name)
            tensors[name] = None if value is None else value[:fresh]
            tensors[f"pair_{name}"] = None if value is None else value[fresh:scored]
        for name in ("x", "eps", "u", "eps_x", "u_x", "eps_r1"):
            tensors[f"picture_{name}"] = pictures and getattr(pictures, name)
        found |= {f"{name}/{update}": _rows(t) for name, t in tensors.items() if t is not None}
    if data.paired is not None:
        found |= {"pair_eps": _rows(data.paired.eps), "pair_y": _rows(data.paired.y)}
    return found


def _rows(tensor: torch.Tensor) -> list[str]:
    rows = tensor.detach().contiguous()
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in rows]


def _live(nets: networks.DmdNetworks) -> Tensors:
    """Everything that the next step would go on from, gathered without a word to `parts`."""
    live = {f"generator/{n}": p for n, p in nets.generator.named_parameters() if p.requires_grad}
    live |= {f"fake/{name}": p for name, p in nets.fake.named_parameters()}
    if nets.head is not None:
        live |= {f"head/{name}": p for name, p in nets.head.named_parameters()}
    owners = {id(p): key for key, p in live.items()}
    for optimizer in nets.optimizers.values():
        for parameter, state in optimizer.state.items():
            key = owners[id(parameter)].replace("/", "_optimizer/", 1)
            live |= {f"{key}.{name}": torch.as_tensor(value) for name, value in state.items()}
    if nets.ema is not None:
        live |= {f"ema/{name}": value for name, value in nets.ema.average.items()}
    return {k: whole(t.detach()).cpu().contiguous().clone() for k, t in sorted(live.items())}


if __name__ == "__main__":
    _serve()
