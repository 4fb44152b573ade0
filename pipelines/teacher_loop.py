"""What every training of a teacher shares: worker group, update, log, checkpoints.

Every random number is keyed by (seed, stage, step, rank), so a resumed run goes on as an
undisturbed one would.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from dmd_core.checkpoint import Checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from dmd_core.noise import stable_seed
from dmd_core.precision import PrecisionPolicy, autocast
from pipelines.config import TeacherTrainSection
from pipelines.metrics_log import MetricsLog
from pipelines.progress import Throttle
from pipelines.storage import Store
from pipelines.workers import Group


class TeacherLoop(ABC):
    """One worker. `ends`: steps at which a stage ends, and a checkpoint is due."""

    log: MetricsLog

    def __init__(
        self,
        section: TeacherTrainSection,
        seed: int,
        store: Store,
        board: Any,
        *,
        ends: Collection[int],
    ) -> None:
        group = Group.here()
        group.prepare_computing(section.threads_per_worker)
        self.rank, self.world = group.rank, group.size
        self.section, self.seed, self.store, self.board = section, seed, store, board
        self.device = group.device(section.use_gpu)
        self.step, self.ends, self.total = 0, ends, max(ends)
        self.losses: list[float] = []
        self.throttle = Throttle(1.0)

    @abstractmethod
    def run(self) -> None:
        """Train from the checkpoint on, write the pipeline folder, report to Ray Train."""

    @abstractmethod
    def stored(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Parts and state of a checkpoint."""

    @abstractmethod
    def take(self, found: Checkpoint) -> None:
        """Inverse of `stored`."""

    # ------------------------------------------------------------------ one step and its state

    def update(
        self,
        loss_fn: Callable[[], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        label: str,
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        # On a CPU the fused attention's backward pass is slow for few tokens: it took a fifth of a
        # step at 16 to 24.
        on_cpu = self.device.type == "cpu"
        attention = sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext()
        compute = PrecisionPolicy.named(self.section.mixed_precision).compute
        with attention, autocast(self.device, compute):
            loss = loss_fn()
        if not math.isfinite(float(loss)):
            raise FloatingPointError(f"{label} loss is {float(loss)} at step {self.step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, self.section.max_grad_norm)
        optimizer.step()
        self.step += 1
        self.losses.append(float(loss))

    def after_step(self, label: str) -> None:
        if self.rank == 0 and self.board is not None and self.throttle.ready():
            self.board.set.remote(done=self.step, network=label, loss=self.losses[-1])
        if self.step % self.section.logging_steps == 0:
            mean = float(np.mean(self.losses))
            self.losses.clear()
            self.log.append({"step": self.step, f"loss_{label.lower()}": mean})
        due = self.step % self.section.checkpointing_steps == 0 or self.step in self.ends
        if self.rank == 0 and due:
            self._save()

    def _save(self) -> None:
        parts, state = self.stored()
        self.log.flush()
        save_checkpoint(
            self.store.fs, self.checkpoints, Checkpoint(self.step, parts, state), alone=True
        )
        prune_checkpoints(self.store.fs, self.checkpoints, keep=2)

    def restore(self) -> None:
        """Go on from the newest checkpoint, if there is one, and with its log."""
        found = load_checkpoint(self.store.fs, self.checkpoints)
        if found is not None:
            self.take(found)
            self.step = found.step
        self.log = MetricsLog(self.store, "teacher_metrics.jsonl", resume_step=self.step)

    # ------------------------------------------------------------------ small helpers

    @property
    def checkpoints(self) -> str:
        return self.store.path("teacher_checkpoints")

    def rng(self, stage: str) -> np.random.Generator:
        return np.random.default_rng(stable_seed(self.seed, stage, self.step, self.rank))

    def share(self, global_batch: int) -> int:
        return max(1, global_batch // self.world)

    def parallel(self, network: nn.Module) -> nn.Module:
        return DistributedDataParallel(network) if self.world > 1 else network
