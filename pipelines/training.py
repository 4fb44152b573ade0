"""Stations 5-7 as a Ray Train job: pairs in, one-step student and fake score out.

Every random number is keyed by (run seed, purpose, sample index), never by rank, and sample i of
global batch k is the same sample on any number of workers. So the run's state is its networks,
optimizers and step alone.
"""

import copy
import math
import time
from typing import Any

import numpy as np
import ray.train
import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dmd_core.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    pack_optimizer,
    prune_checkpoints,
    save_checkpoint,
    unpack_optimizer,
)
from dmd_core.denoiser import GuidedDenoiser, NetworkDenoiser, unet_network
from dmd_core.files import write_atomic
from dmd_core.noise import sample_noise, sample_uniform, stable_seed
from dmd_core.student import OneStepStudent
from dmd_core.teacher import load_teacher
from dmd_core.train_step import (
    DmdWeights,
    PairedPart,
    StepNoise,
    fake_score_step,
    generator_step,
)
from pipelines.batches import PairReader, part_of_batch
from pipelines.config import PairsSection, StorageSection, TrainSection
from pipelines.manifest import load_manifest
from pipelines.metrics_log import MetricsLog
from pipelines.plots import picture_grid
from pipelines.progress import Throttle
from pipelines.storage import Store, local_copy, open_store
from pipelines.workers import set_threads

CHECKPOINTS = "checkpoints"


def train_loop(config: dict[str, Any]) -> None:
    """One worker of `dmd train`. `config`: train, pairs, seed, dir, storage, teacher, root,
    version, digest, board."""
    set_threads(config["train"]["threads_per_worker"])
    _DmdRun(config).run()


class _DmdRun:
    def __init__(self, config: dict[str, Any]) -> None:
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.section = TrainSection.model_validate(config["train"])
        self.pairs = PairsSection.model_validate(config["pairs"])
        storage = StorageSection.model_validate(config["storage"])
        self.store: Store = open_store(config["dir"], storage)
        self.seed, self.digest, self.board = config["seed"], config["digest"], config.get("board")
        self.device = ray.train.torch.get_device() if self.section.use_gpu else torch.device("cpu")
        root = open_store(config["root"], storage)
        manifest = load_manifest(root, config["version"])
        if manifest.digest != self.digest:
            raise CheckpointError(
                f"{root.url} version {config['version']} has digest {manifest.digest[:12]}…, "
                f"expected {self.digest[:12]}… as pinned by this run"
            )
        self.reader = PairReader(root, manifest, seed=stable_seed(self.seed, "pairs"))
        self.prompt_reader = PairReader(root, manifest, seed=stable_seed(self.seed, "prompts"))
        self.teacher = load_teacher(
            local_copy(open_store(config["teacher"], storage)), device=self.device
        )
        self._build()
        self.step = 0
        self._restore()

    def _build(self) -> None:
        """G and F start as the teacher; all three share its schedule."""
        section = self.section
        compute = torch.bfloat16 if section.mixed_precision == "bf16" else torch.float32
        unet, schedule = self.teacher.pipeline.unet, self.teacher.schedule
        self.generator = copy.deepcopy(unet).train().requires_grad_(True)
        self.fake = copy.deepcopy(unet).train().requires_grad_(True)
        student_net, fake_net = self._parallel(self.generator), self._parallel(self.fake)
        self.student = OneStepStudent(NetworkDenoiser(unet_network(student_net), schedule, compute))
        self.fake_trained = NetworkDenoiser(unet_network(fake_net), schedule, compute)
        self.fake_frozen = NetworkDenoiser(unet_network(self.fake), schedule, compute)
        uncond = self.teacher.encode_prompts([self.pairs.negative_prompt])
        self.real = GuidedDenoiser(self.teacher.denoiser(compute), section.guidance_scale, uncond)
        self.weights = DmdWeights(
            dm=section.dm_weight,
            reg=section.lambda_reg,
            regression=section.regression_loss,
            t_min_fraction=section.t_min_fraction,
            t_max_fraction=section.t_max_fraction,
        )
        self.generator_optimizer, self.generator_lr = self._optimizer(
            self.generator, section.learning_rate
        )
        self.fake_optimizer, self.fake_lr = self._optimizer(
            self.fake, section.fake_learning_rate or section.learning_rate
        )

    def run(self) -> None:
        section = self.section
        self.log = MetricsLog(
            self.store,
            resume_step=self.step,
            tensorboard=section.report_to == "tensorboard" and self.rank == 0,
        )
        board_throttle, flush_throttle = Throttle(0.5), Throttle(10.0)
        window: list[dict[str, float]] = []
        started = time.monotonic()
        if self.step == 0:
            self._validate()
        while self.step < section.max_train_steps:
            window.append(self._train_step())
            self.step += 1
            last = self.step == section.max_train_steps
            if self.rank == 0 and self.board is not None and (board_throttle.ready() or last):
                self.board.set.remote(done=self.step, **window[-1])
            if self.step % section.logging_steps == 0 or last:
                elapsed = time.monotonic() - started
                record = self._mean_over_workers(window)
                record["samples_per_second"] = len(window) * section.train_batch_size / elapsed
                window, started = [], time.monotonic()
                self.log.append({"step": self.step, **record})
                if self.rank == 0 and flush_throttle.ready():
                    self.log.flush()
            if self.step % section.validation_steps == 0 or last:
                self._validate()
            if self.step % section.checkpointing_steps == 0 or last:
                self._save()
        ray.train.report({"step": self.step})

    # ------------------------------------------------------------------ one iteration

    def _train_step(self) -> dict[str, float]:
        section, step = self.section, self.step
        prompts, noise = self._unpaired(step)
        cond = self.teacher.encode_prompts(prompts)
        paired = self._paired(step)

        result = generator_step(
            self.student, self.real, self.fake_frozen, noise, cond, paired, self.weights
        )
        # DDP averages gradients over workers; sums over the global counts, times the world size,
        # make that the mean over the global batch however unequal the parts are.
        loss_dm = result.loss_dm.sum() * self.world / section.train_batch_size
        loss_reg = result.loss_reg.sum() * self.world / max(1, section.regression_batch_size)
        loss = self.weights.dm * loss_dm + self.weights.reg * loss_reg
        norm = self._update(loss, self.generator, self.generator_optimizer, self.generator_lr)

        per_sample = fake_score_step(self.fake_trained, result.x, noise, cond)
        loss_fake = per_sample.sum() * self.world / section.train_batch_size
        fake_norm = self._update(loss_fake, self.fake, self.fake_optimizer, self.fake_lr)
        return {
            "loss_dm": float(loss_dm),
            "loss_reg": float(loss_reg),
            "loss_fake": float(loss_fake),
            "grad_norm": norm,
            "fake_grad_norm": fake_norm,
            "sample_mean": float(result.x.mean()),
            "sample_std": float(result.x.std()),
        }

    def _update(self, loss: torch.Tensor, network: nn.Module, optimizer, lr) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(network.parameters(), self.section.max_grad_norm))
        if not (math.isfinite(float(loss)) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {self.step}: loss {float(loss)}, gradient norm {norm}; "
                "lower train.learning_rate or train.max_grad_norm"
            )
        optimizer.step()
        lr.step()
        return norm

    def _unpaired(self, step: int) -> tuple[tuple[str, ...], StepNoise]:
        """Prompts and fresh noise of this worker's part of global batch `step`."""
        size = self.section.train_batch_size
        batch = self.prompt_reader.batch(step, size, self.rank, self.world)
        part = part_of_batch(size, self.rank, self.world)
        samples = [step * size + index for index in range(part.start, part.stop)]
        shape = batch.noise.shape[1:]

        def seeds(purpose: str) -> list[int]:
            return [stable_seed(self.seed, purpose, sample) for sample in samples]

        noise = StepNoise(
            z=sample_noise(seeds("z"), shape).to(self.device),
            eps_dm=sample_noise(seeds("eps_dm"), shape).to(self.device),
            u_dm=sample_uniform(seeds("u_dm")).to(self.device),
            eps_fake=sample_noise(seeds("eps_fake"), shape).to(self.device),
            u_fake=sample_uniform(seeds("u_fake")).to(self.device),
        )
        return batch.prompts, noise

    def _paired(self, step: int) -> PairedPart | None:
        if self.weights.reg == 0:
            return None
        size = self.section.regression_batch_size
        batch = self.reader.batch(step, size, self.rank, self.world)
        return PairedPart(
            eps=batch.noise.float().to(self.device),
            y=batch.latents.float().to(self.device),
            cond=self.teacher.encode_prompts(batch.prompts),
        )

    # ------------------------------------------------------------------ state

    def _save(self) -> None:
        if self.rank != 0:
            return
        self.log.flush()
        parts = {
            "generator": dict(self.generator.state_dict()),
            "fake": dict(self.fake.state_dict()),
            "generator_optimizer": pack_optimizer(self.generator_optimizer),
            "fake_optimizer": pack_optimizer(self.fake_optimizer),
        }
        state = {
            "pairs_digest": self.digest,
            "teacher_revision": self.teacher.revision,
            "generator_lr": self.generator_lr.state_dict(),
            "fake_lr": self.fake_lr.state_dict(),
        }
        root = self.store.path(CHECKPOINTS)
        save_checkpoint(self.store.fs, root, Checkpoint(self.step, parts, state))
        prune_checkpoints(self.store.fs, root, keep=self.section.checkpoints_total_limit)

    def _restore(self) -> None:
        found = load_checkpoint(self.store.fs, self.store.path(CHECKPOINTS))
        if found is None:
            return
        for key, ours in (
            ("pairs_digest", self.digest),
            ("teacher_revision", self.teacher.revision),
        ):
            if found.state[key] != ours:
                raise CheckpointError(
                    f"checkpoint of step {found.step} in {self.store.url} has {key} "
                    f"{found.state[key][:12]}…, expected {ours[:12]}…; use another run.dir"
                )
        self.generator.load_state_dict(found.parts["generator"])
        self.fake.load_state_dict(found.parts["fake"])
        for name in ("generator", "fake"):
            optimizer, lr = getattr(self, f"{name}_optimizer"), getattr(self, f"{name}_lr")
            unpack_optimizer(optimizer, found.parts[f"{name}_optimizer"])
            lr.load_state_dict(found.state[f"{name}_lr"])
            # The scheduler writes its rate into the optimizer at the end of a step only.
            for group, value in zip(optimizer.param_groups, lr.get_last_lr(), strict=True):
                group["lr"] = value
        self.step = found.step

    def _validate(self) -> None:
        """Teacher above, student below, on the same stored noise: samples/step_*.png."""
        if self.rank != 0:
            return
        count = self.section.num_validation_images
        batch = self.reader.batch(0, count)
        with torch.no_grad():
            x = self.student_frozen(batch.noise.float(), batch.prompts)
        rows = [self.teacher.decode(batch.latents), self.teacher.decode(x)]
        path = self.store.path("samples", f"step_{self.step:08d}.png")
        write_atomic(self.store.fs, path, picture_grid(rows))
        self.log.add_picture("samples", self.step, np.concatenate(rows[1], axis=1))

    def student_frozen(self, eps: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        """The student outside DDP, so that rank 0 may sample alone."""
        denoiser = NetworkDenoiser(unet_network(self.generator), self.teacher.schedule)
        return OneStepStudent(denoiser)(eps.to(self.device), self.teacher.encode_prompts(prompts))

    # ------------------------------------------------------------------ small helpers

    def _optimizer(self, network: nn.Module, learning_rate: float):
        section = self.section
        optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=learning_rate,
            betas=(section.adam_beta1, section.adam_beta2),
            weight_decay=section.adam_weight_decay,
        )
        lr = get_scheduler(
            section.lr_scheduler,
            optimizer,
            num_warmup_steps=section.lr_warmup_steps,
            num_training_steps=section.max_train_steps,
        )
        return optimizer, lr

    def _parallel(self, network: nn.Module) -> nn.Module:
        if self.world == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices)

    def _mean_over_workers(self, window: list[dict[str, float]]) -> dict[str, float]:
        means = {key: float(np.mean([entry[key] for entry in window])) for key in window[0]}
        if self.world > 1:
            values = torch.tensor(list(means.values()), device=self.device)
            torch.distributed.all_reduce(values)
            means = dict(zip(means, (values / self.world).tolist(), strict=True))
        return means
