"""Stations 5-7 as a Ray Train job: pairs and prompts in, student and fake score out.

The run's state is its networks, optimizers, `Progress` and the segments of the pairs it follows
alone: every random number and every batch is a function of these and of the run's seed.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero

from dmd_core.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from dmd_core.decoder import decoded, load_decoder
from dmd_core.files import write_atomic
from dmd_core.health import Tally
from dmd_core.losses import REGRESSION_LOSSES, Distance, regression_distance
from dmd_core.networks import DmdNetworks, World
from dmd_core.noise import sample_noise, stable_seed
from dmd_core.perceptual import load_perceptual
from dmd_core.teacher import load_teacher
from dmd_core.trainer import DmdTrainer
from pipelines.config import PairsSection, StorageSection
from pipelines.following import FollowedPrompts, Follower, NewerVersions, PairVersions, PinHolder
from pipelines.metrics_log import MetricsLog
from pipelines.pair_fit import PairFit
from pipelines.pins import Pins
from pipelines.plots import picture_grid
from pipelines.progress import Throttle
from pipelines.prompts import read_prompts
from pipelines.step_data import Progress, StepSource
from pipelines.storage import Store, local_copy, open_store
from pipelines.streams import PictureStream, PromptStream, open_pictures
from pipelines.train_config import StageKeys, TrainSection
from pipelines.train_settings import lr_factor, stage_settings, trainer_settings
from pipelines.workers import set_threads

CHECKPOINTS = "checkpoints"
_SAMPLE_PROMPTS = "prompts of the sample pictures"
_logger = logging.getLogger(__name__)


def train_loop(config: dict[str, Any]) -> None:
    """One worker of `dmd train`. `config`: train, pairs, seed, dir, storage, teacher, root, pins,
    pin (a `PinHolder`), board."""
    set_threads(config["train"]["threads_per_worker"])
    _DmdRun(config).run()


class _DmdRun:
    def __init__(self, config: dict[str, Any]) -> None:
        context = ray.train.get_context()
        self.rank, world = context.get_world_rank(), context.get_world_size()
        self.section = TrainSection.model_validate(config["train"])
        self.pairs_section = PairsSection.model_validate(config["pairs"])
        self.storage = StorageSection.model_validate(config["storage"])
        self.store: Store = open_store(config["dir"], self.storage)
        self.seed, self.board = config["seed"], config.get("board")
        self.pins = Pins.from_json(config["pins"])
        device = ray.train.torch.get_device() if self.section.use_gpu else torch.device("cpu")
        self.teacher = load_teacher(
            local_copy(open_store(config["teacher"], self.storage)), device=device
        )
        self.root = open_store(config["root"], self.storage)
        self.versions = PairVersions(self.root, self.pins, self.seed)
        self.follower = self._follower(config.get("pin"))
        self.networks = DmdNetworks(
            self.teacher,
            trainer_settings(self.section, self.seed),
            World(self.rank, world, device),
            self._shape(),
        )
        uncond = self.teacher.encode_prompts([self.pairs_section.negative_prompt])
        self.trainer = DmdTrainer(self.networks, uncond)
        self.source = StepSource(
            self.teacher,
            seed=self.seed,
            rank=self.rank,
            world=world,
            shape=self._shape(),
            timesteps=len(self.networks.timesteps),
            prompts=self._open_prompts(),
            pictures=self._open_pictures(),
        )
        self.plan = self.section.plan()
        self.lr_factor = lr_factor(self.section)
        self.progress, self.finished = Progress(), False
        self._restore()

    # ------------------------------------------------------------------ what it reads

    def _open_prompts(self) -> PromptStream | FollowedPrompts:
        if not self.pins.prompts:
            return FollowedPrompts(self.versions)
        prompts = read_prompts(self.pins.prompt_source, self.storage).prompts
        return PromptStream(prompts, stable_seed(self.seed, "prompts"))

    def _follower(self, pin: dict[str, str] | None) -> Follower:
        pairs, newer = self.pairs_section, None
        if self.rank == 0:
            fit = PairFit(
                self.teacher.revision, self.teacher.latent_shape, pairs.height, pairs.width
            )
            holder = PinHolder(**pin) if pin else None
            newer = NewerVersions(self.root, fit, holder, _logger.warning)
        alone = ray.train.get_context().get_world_size() == 1
        share = (lambda found: found) if alone else broadcast_from_rank_zero
        return Follower(self.section, self.versions, newer, share)

    def _open_pictures(self) -> PictureStream | None:
        if not self.section.uses_gan:
            return None
        store, refs = open_pictures(self.section.real_pictures, self.storage)
        height, width = (
            side * self.teacher.pipeline.vae_scale_factor for side in self._shape()[1:]
        )
        seed = stable_seed(self.seed, "pictures")
        return PictureStream(store, refs, self.teacher.encode, (height, width), seed)

    def _shape(self) -> tuple[int, ...]:
        return self.teacher.latent_shape(self.pairs_section.height, self.pairs_section.width)

    def _distance(self, keys: StageKeys) -> Distance | None:
        """The regression loss of a stage: on latents, or on what they decode to. None: it has
        none."""
        if not keys.needs_pairs:
            return None
        if keys.regression_loss in REGRESSION_LOSSES:
            return regression_distance(keys.regression_loss)
        trunk = self.section.perceptual_trunk or None
        resize = self.section.perceptual_resize or None
        measure = load_perceptual(keys.regression_loss, trunk=trunk, resize=resize)
        measure.to(self.teacher.device)
        return decoded(measure, load_decoder(self.teacher, keys.regression_decoder))

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        self.log = MetricsLog(
            self.store,
            resume_step=self.progress.step,
            tensorboard=self.section.report_to == "tensorboard" and self.rank == 0,
        )
        self.flush_throttle = Throttle(10.0)
        if self.progress.step == 0:
            self._validate()
        while not self.finished:
            self._run_stage()
        ray.train.report({"step": self.progress.step})

    def _run_stage(self) -> None:
        """To the end of the current stage; its last step is logged, sampled and saved. What is
        saved there stands at the start of the next stage: how a stage ended is not asked again."""
        section, last = self.section, self.progress.stage == len(self.plan) - 1
        stage, keys = self.plan[self.progress.stage]
        self.trainer.enter_stage(stage_settings(section, keys, self._distance(keys)))
        board_throttle = Throttle(0.5)
        window, window_steps, started = Tally(), 0, time.monotonic()
        over = self.progress.stage_is_over(stage, keys, None)
        while not over:
            data = self.source.draw(self.progress, keys, self.versions.stream(keys))
            tally = self.trainer.step(data, self.lr_factor(self.progress.step))
            window.merge(tally)
            window_steps += 1
            before, self.progress = self.progress, self.progress.after_step(keys)
            step, metrics = self.progress.step, None
            over = self.progress.stage_is_over(stage, keys, None)
            if self.rank == 0 and self.board is not None and (board_throttle.ready() or over):
                self.board.set.remote(done=step, **self._shown(tally, stage.name))
            if step % section.logging_steps == 0 or over:
                elapsed = time.monotonic() - started
                metrics = self._mean_over_workers(window)
                metrics["samples_per_second"] = window_steps * keys.train_batch_size / elapsed
                self._log(metrics)
                window, window_steps, started = Tally(), 0, time.monotonic()
                over = self.progress.stage_is_over(stage, keys, metrics)
            self.finished = over and last
            if over and not last:
                self.progress = self.progress.next_stage()
            switched = None if self.finished else self.follower.follow(before, self.progress)
            if switched is not None:
                self._log(switched)
            if step % section.validation_steps == 0 or over:
                self._validate()
            if step % section.checkpointing_steps == 0 or over:
                self._save()
        self.finished = last  # also where there was nothing left to do

    def _log(self, metrics: Mapping[str, float]) -> None:
        names = {"stage": self.progress.stage} if self.section.stages else {}
        self.log.append({"step": self.progress.step, **names, **metrics})
        if self.rank == 0 and self.flush_throttle.ready():
            self.log.flush()

    def _shown(self, tally: Tally, stage: str) -> dict[str, Any]:
        shown: dict[str, Any] = {
            n: v for n, v in tally.means().items() if n.startswith("loss") and "_t" not in n
        }
        if self.versions.segments:
            shown["pairs"] = f"pairs v{self.versions.segments[-1].version}"
        return shown | ({"stage": stage} if self.section.stages else {})

    def _mean_over_workers(self, window: Tally) -> dict[str, float]:
        """True means of everything counted on all workers since the last line."""
        if self.networks.world.size == 1:
            return window.means()
        names = sorted(window.sums)
        values = torch.tensor(
            [window.sums[name] for name in names],
            dtype=torch.float64,
            device=self.networks.world.device,
        )
        torch.distributed.all_reduce(values)
        totals = {name: (total, n) for name, (total, n) in zip(names, values.tolist(), strict=True)}
        return Tally(totals).means()

    # ------------------------------------------------------------------ state

    def _save(self) -> None:
        if self.rank != 0:
            return
        self.log.flush()
        state = {
            "pairs_digest": self.pins.digest,
            "pairs_segments": self.versions.state(),
            "teacher_revision": self.teacher.revision,
            "progress": asdict(self.progress),
            "finished": self.finished,
            "total_steps": self.section.total_steps,
            "nonfinite_updates": self.trainer.nonfinite_updates,
        }
        root = self.store.path(CHECKPOINTS)
        checkpoint = Checkpoint(self.progress.step, self.networks.parts(), state)
        save_checkpoint(self.store.fs, root, checkpoint)
        prune_checkpoints(self.store.fs, root, keep=self.section.checkpoints_total_limit)

    def _restore(self) -> None:
        found = load_checkpoint(self.store.fs, self.store.path(CHECKPOINTS))
        if found is None:
            return
        for key, ours in (
            ("pairs_digest", self.pins.digest),
            ("teacher_revision", self.teacher.revision),
        ):
            if found.state[key] != ours:
                raise CheckpointError(
                    f"checkpoint of step {found.step} in {self.store.url} has {key} "
                    f"{found.state[key][:12]}…, expected {ours[:12]}…; use another run.dir"
                )
        self.networks.load(found.parts)
        self.trainer.nonfinite_updates = found.state["nonfinite_updates"]
        self.progress = Progress(**found.state["progress"])
        self.versions.restore(found.state["pairs_segments"])
        same_plan = found.state["total_steps"] == self.section.total_steps
        self.finished = found.state["finished"] and same_plan

    # ------------------------------------------------------------------ pictures to look at

    def _validate(self) -> None:
        """Teacher above, student below, on the same noise: samples/step_*.png."""
        if self.rank != 0:
            return
        eps, prompts, latents = self._shown_pairs(self.section.num_validation_images)
        student = self.networks.student()
        seeds = [stable_seed(self.seed, "samples", index) for index in range(len(prompts))]
        noises = [eps.to(self.teacher.device)] + [
            sample_noise(
                [stable_seed(seed, "again", step) for seed in seeds], tuple(eps.shape[1:])
            ).to(self.teacher.device)
            for step in range(1, len(student.timesteps))
        ]
        x = student.sample(noises, self.teacher.encode_prompts(prompts))
        rows = [self.teacher.decode(latents), self.teacher.decode(x)]
        path = self.store.path("samples", f"step_{self.progress.step:08d}.png")
        write_atomic(self.store.fs, path, picture_grid(rows))
        self.log.add_picture("samples", self.progress.step, np.concatenate(rows[1], axis=1))

    def _shown_pairs(self, count: int) -> tuple[torch.Tensor, tuple[str, ...], torch.Tensor]:
        """(ε, prompts, teacher's latents): stored pairs, or a few made here if there are none."""
        if self.pins.default is not None:
            batch = self.versions.first().batch(0, count)
            return batch.noise.float(), batch.prompts, batch.latents
        if not hasattr(self, "_made"):
            prompts = read_prompts(self.pins.prompt_source, self.storage).prompts[:count]
            seeds = [
                stable_seed(self.seed, _SAMPLE_PROMPTS, index) for index in range(len(prompts))
            ]
            eps, section = sample_noise(seeds, self._shape()), self.pairs_section
            latents = self.teacher.solve(
                eps, prompts,
                solver=section.solver, steps=section.steps,
                guidance_scale=section.guidance_scale, negative_prompt=section.negative_prompt,
            )  # fmt: skip
            self._made = eps, tuple(prompts), latents.cpu()
        return self._made
