"""Optimizer updates and guard rails around the two steps of `train_step.py`.

One `DmdTrainer` per worker. It knows no files, no data order and no Ray: the caller brings every
batch with its random numbers.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from dmd_core.condition import Condition
from dmd_core.denoiser import GuidedDenoiser
from dmd_core.health import DivergedError, Tally, sample_health
from dmd_core.losses import Distance
from dmd_core.networks import DmdNetworks
from dmd_core.train_step import (
    GeneratorStep,
    LossSettings,
    PairedPart,
    Pictures,
    StepNoise,
    fake_score_step,
    generator_step,
)


@dataclass(frozen=True)
class StageSettings:
    """What a stage may change. Batches are global: the losses are means over them.

    `gan_fake`, `r1`: weights of the discriminator's loss and penalty in the fake score's updates.
    """

    losses: LossSettings
    guidance_scale: float
    learning_rate: float
    fake_learning_rate: float
    batch_size: int
    regression_batch_size: int
    gan_fake: float = 0.0
    r1: float = 0.0
    distance: Distance | None = None


@dataclass(frozen=True)
class Unpaired:
    """Conditions and fresh noise of this worker's part of one global batch; `pictures` for the
    discriminator, in as many rows; `student_step`: which of the student's steps makes x."""

    cond: Condition
    noise: StepNoise
    pictures: Pictures | None = None
    student_step: int = 0


@dataclass(frozen=True)
class StepData:
    """One iteration: the first of `unpaired` serves the generator and the first fake update, the
    others one more fake update each."""

    unpaired: tuple[Unpaired, ...]
    paired: PairedPart | None


class DmdTrainer:
    """`enter_stage`, then `step` for every iteration of DMD or DMD2.

    `uncond`: the condition (one row) that guidance of the real score moves away from.
    `nonfinite_updates`: updates left out so far because their gradient was not finite.
    """

    def __init__(self, networks: DmdNetworks, uncond: Condition) -> None:
        self.networks, self._uncond = networks, uncond
        self.nonfinite_updates = 0

    def enter_stage(self, stage: StageSettings) -> None:
        self._stage = stage
        teacher, precision = self.networks.teacher, self.networks.settings.precision
        self._real = GuidedDenoiser(
            teacher.denoiser(precision.compute), stage.guidance_scale, self._uncond
        )

    def step(self, data: StepData, lr_factor: float = 1.0) -> Tally:
        """One generator update, then a fake-score update for each of `data.unpaired` (DMD2's two
        time scales); what happened, as sums."""
        nets, stage, tally = self.networks, self._stage, Tally()
        first = data.unpaired[0]
        result = generator_step(
            nets.student_trained, self._real, nets.fake_frozen, first.noise, first.cond,
            data.paired, stage.losses, step=first.student_step, distance=stage.distance,
            discriminator=nets.fake_frozen.judge,
        )  # fmt: skip
        loss = self._generator_loss(result, tally)
        updated = self._update({"generator": stage.learning_rate * lr_factor}, loss, tally)
        if updated and nets.ema is not None:
            nets.ema.update(nets.weights, stage.batch_size)
        sample_health(result, tally)

        fake_lr = stage.fake_learning_rate * lr_factor
        self._fake_update(result.x, result.cond, first, fake_lr, tally)
        for extra in data.unpaired[1:]:
            x = self._samples(extra, data)
            cond = extra.cond
            if stage.losses.pairs_in_dm and data.paired is not None:
                cond = Condition.cat(cond, data.paired.cond)
            self._fake_update(x, cond, extra, fake_lr, tally)
        return tally

    def _generator_loss(self, result: GeneratorStep, tally: Tally) -> torch.Tensor:
        """Means over the global batch: DDP averages gradients over workers, so sums over global
        counts, times the world size, are right however unequal the workers' parts are."""
        stage, losses = self._stage, self._stage.losses
        counts = {
            "dm": self._scored_batch(),
            "reg": stage.regression_batch_size,
            "gan": stage.batch_size,
        }
        total = result.x.new_zeros(())
        for name, count in counts.items():
            loss = getattr(result, f"loss_{name}")
            if len(loss):
                total = (
                    total + getattr(losses, name) * loss.sum() * self.networks.world.size / count
                )
                tally.add_mean(f"loss_{name}", loss)
        return total

    def _fake_update(
        self, x: torch.Tensor, cond: Condition, part: Unpaired, lr: float, tally: Tally
    ) -> None:
        stage = self._stage
        result = fake_score_step(
            self.networks.fake_trained, x, part.noise, cond, stage.losses, pictures=part.pictures
        )
        loss = result.loss_score.sum() * self.networks.world.size / self._scored_batch()
        per_picture = self.networks.world.size / stage.batch_size
        loss = loss + stage.gan_fake * result.loss_gan.sum() * per_picture
        loss = loss + stage.r1 * result.loss_r1.sum() * per_picture
        tally.add_mean("loss_fake", result.loss_score)
        tally.add_bins("loss_fake_t", result.loss_score, result.t, self.networks.teacher.schedule)
        if len(result.loss_gan):
            tally.add_mean("loss_discriminator", result.loss_gan)
        if len(result.loss_r1):
            tally.add_mean("loss_r1", result.loss_r1)
        rates = {"fake": lr} | ({"head": lr} if part.pictures is not None else {})
        self._update(rates, loss, tally)

    def _samples(self, part: Unpaired, data: StepData) -> torch.Tensor:
        """Fresh samples of the student for one more fake update, without gradient."""
        student, noise = self.networks.student(averaged=False), part.noise
        with torch.no_grad():
            x_t = student.rollout(noise.z, part.cond, part.student_step)
            x = student.predict(x_t, part.student_step, part.cond)
            if self._stage.losses.pairs_in_dm and data.paired is not None:
                x = torch.cat([x, student(data.paired.eps, data.paired.cond)])
        return x

    def _scored_batch(self) -> int:
        """Samples of one fake-score update, over all workers."""
        stage = self._stage
        return stage.batch_size + stage.regression_batch_size * stage.losses.pairs_in_dm

    def _update(self, rates: dict[str, float], loss: torch.Tensor, tally: Tally) -> bool:
        """One step of the named optimizers at these rates, unless a gradient is not finite: such
        an update is left out, and counted. True when the weights moved."""
        optimizers = {name: self.networks.optimizers[name] for name in rates}
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        if not loss.requires_grad:
            return False  # no loss of this stage reaches these weights
        loss.backward()
        norms = {}
        for name, parameters in self.networks.parameters().items():
            if name in rates:
                limit = self.networks.settings.max_grad_norm
                norms[name] = float(nn.utils.clip_grad_norm_(parameters, limit))
                tally.add(f"{name}_grad_norm", norms[name], 1.0)
        if not all(math.isfinite(norm) for norm in norms.values()):
            self._count_nonfinite(next(iter(rates)), float(loss.detach()))
            return False
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name]
            optimizer.step()
        return True

    def _count_nonfinite(self, name: str, loss: float) -> None:
        self.nonfinite_updates += 1
        if self.nonfinite_updates > self.networks.settings.max_nonfinite_updates:
            raise DivergedError(
                f"{self.nonfinite_updates} updates had a gradient that was not finite (last: "
                f"{name}, loss {loss}); more than train.max_nonfinite_updates allows. Lower "
                "train.learning_rate or train.max_grad_norm, or raise train.fake_updates"
            )
