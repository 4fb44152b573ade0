"""Optimizer updates and guard rails around the two steps of `train_step.py`.

One `DmdTrainer` per worker. It knows no files, no data order and no Ray: the caller brings every
batch with its random numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from dmd_core.condition import Condition
from dmd_core.denoiser import GuidedDenoiser
from dmd_core.health import DivergedError, Tally, sample_health
from dmd_core.losses import Distance
from dmd_core.networks import DmdNetworks
from dmd_core.parallel import accumulating, whole
from dmd_core.step_types import GeneratorStep, LossSettings, StepData, Unpaired
from dmd_core.train_step import fake_score_step, generator_step

# The student's output x, detached, and its condition: what a fake-score update trains on.
Samples = tuple[torch.Tensor, Condition]


@dataclass(frozen=True)
class StageSettings:
    """What a stage may change. Batches are global: the losses are means over them.

    `gan_fake`, `r1`: weights of the discriminator's loss and penalty in the fake score's updates.
    `micro_batch_size`: most samples of each batch in one forward and backward pass of a worker;
    the rest is accumulated. None: the worker's whole part at once.
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
    micro_batch_size: int | None = None


class DmdTrainer:
    """`enter_stage`, then `step` for every iteration of DMD or DMD2.

    `uncond`: the condition (one row) that guidance of the real score moves away from.
    `nonfinite_updates`: updates left out so far because their gradient was not finite.
    """

    def __init__(self, networks: DmdNetworks, uncond: Condition) -> None:
        self.networks, self._uncond = networks, uncond
        self.nonfinite_updates = 0
        self._nonfinite_in_a_row: dict[str, int] = {}  # by network

    def resume(self, nonfinite_updates: int) -> None:
        """The networks have been given the weights of an earlier state, with this count."""
        self.nonfinite_updates = nonfinite_updates
        self._nonfinite_in_a_row.clear()

    def enter_stage(self, stage: StageSettings) -> None:
        self._stage = stage
        teacher, precision = self.networks.teacher, self.networks.settings.precision
        self._real = GuidedDenoiser(
            teacher.denoiser(precision.compute), stage.guidance_scale, self._uncond
        )

    def step(self, data: StepData, lr_factor: float = 1.0) -> Tally:
        """One generator update, then a fake-score update for each of `data.unpaired` (DMD2's two
        time scales); what happened, as sums."""
        stage, tally = self._stage, Tally()
        paired = stage.regression_batch_size if data.paired is not None else 0
        pieces = data.pieces(self._pieces(stage.batch_size), self._pieces(paired))
        made: list[Samples] = []
        losses = [partial(self._generator_loss, piece, made, tally) for piece in pieces]
        updated = self._update({"generator": stage.learning_rate * lr_factor}, losses, tally)
        if updated and self.networks.ema is not None:
            self.networks.ema.update(self.networks.weights, stage.batch_size)

        fake_lr = stage.fake_learning_rate * lr_factor
        self._fake_update([partial(_given, samples) for samples in made], pieces, 0, fake_lr, tally)
        for update in range(1, len(data.unpaired)):
            drawn = [partial(self._samples, piece, update) for piece in pieces]
            self._fake_update(drawn, pieces, update, fake_lr, tally)
        return tally

    def _pieces(self, batch: int) -> int:
        """Into how many pieces every worker cuts its part of a global batch: the same number on
        all, so that sharded networks run in step. Where parts are uneven a piece may have one
        sample more than `micro_batch_size`."""
        workers, micro = self.networks.world.size, self._stage.micro_batch_size
        if not batch or micro is None:
            return min(batch, 1)
        most, least = -(-batch // workers), batch // workers
        return min(-(-most // micro), least)

    # ------------------------------------------------------------------ the generator

    def _generator_loss(self, piece: StepData, made: list[Samples], tally: Tally) -> torch.Tensor:
        nets, stage, first = self.networks, self._stage, piece.unpaired[0]
        result = generator_step(
            nets.student_trained, self._real, nets.fake_frozen, first.noise, first.cond,
            piece.paired, stage.losses, step=first.student_step, distance=stage.distance,
            discriminator=nets.fake_frozen.judge,
        )  # fmt: skip
        made.append((result.x, result.cond))
        if len(result.x):
            sample_health(result, tally)
        return self._weighted(result, tally)

    def _weighted(self, result: GeneratorStep, tally: Tally) -> torch.Tensor:
        """Means over the global batch: gradients are averaged over workers, so sums over global
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

    # ------------------------------------------------------------------ the fake score

    def _fake_update(
        self,
        samples: Sequence[Callable[[], Samples]],
        pieces: Sequence[StepData],
        update: int,
        lr: float,
        tally: Tally,
    ) -> None:
        scored = self._stage.losses.pairs_in_dm
        losses = [
            partial(self._fake_loss, make, piece.unpaired[update], tally)
            for make, piece in zip(samples, pieces, strict=True)
            if len(piece.unpaired[update].noise.z[0]) or (scored and piece.paired is not None)
        ]
        judged = any(piece.unpaired[update].pictures is not None for piece in pieces)
        self._update({"fake": lr} | ({"head": lr} if judged else {}), losses, tally)

    def _fake_loss(self, make: Callable[[], Samples], part: Unpaired, tally: Tally) -> torch.Tensor:
        stage, (x, cond) = self._stage, make()
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
        return loss

    def _samples(self, piece: StepData, update: int) -> Samples:
        """Fresh samples of the student for one more fake update, without gradient."""
        part, student = piece.unpaired[update], self.networks.student
        x, cond = part.noise.z[0], part.cond
        with torch.no_grad():
            if len(x):
                x_t = student.rollout(part.noise.z, cond, part.student_step)
                x = student.predict(x_t, part.student_step, cond)
            if self._stage.losses.pairs_in_dm and piece.paired is not None:
                x = torch.cat([x, student(piece.paired.eps, piece.paired.cond)])
                cond = Condition.cat(cond, piece.paired.cond)
        return x, cond

    def _scored_batch(self) -> int:
        """Samples of one fake-score update, over all workers."""
        stage = self._stage
        return stage.batch_size + stage.regression_batch_size * stage.losses.pairs_in_dm

    # ------------------------------------------------------------------ one update

    def _update(
        self, rates: dict[str, float], losses: Sequence[Callable[[], torch.Tensor]], tally: Tally
    ) -> bool:
        """One step of the named optimizers at these rates on the sum of `losses`, unless a
        gradient is not finite: such an update is left out, and counted. True when the weights
        moved."""
        network = self.networks.trained[next(iter(rates))]
        total, reached = torch.zeros(()), False
        try:
            for index, loss_of in enumerate(losses):
                with accumulating(network, last=index == len(losses) - 1):
                    loss = loss_of()
                    if loss.requires_grad:  # else no loss of this stage reaches these weights
                        loss.backward()
                        reached = True
                total = total.to(loss.device) + loss.detach()
            return reached and self._step(rates, total, tally)
        finally:
            # Not kept while the other network is trained, nor for a start from other weights.
            for name in rates:
                self.networks.optimizers[name].zero_grad(set_to_none=True)

    def _step(self, rates: dict[str, float], loss: torch.Tensor, tally: Tally) -> bool:
        """Clip, look, step."""
        norms = {name: self._clip(name) for name in self.networks.parameters() if name in rates}
        for name, norm in norms.items():
            tally.add(f"{name}_grad_norm", norm, 1.0)
        name = next(iter(rates))
        if not all(math.isfinite(norm) for norm in norms.values()):
            self._count_nonfinite(name, float(loss))
            return False
        self._nonfinite_in_a_row[name] = 0
        for name, rate in rates.items():
            optimizer = self.networks.optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        return True

    def _clip(self, name: str) -> float:
        limit = self.networks.settings.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self.networks.parameters()[name], limit)
        return float(whole(norm))

    def _count_nonfinite(self, name: str, loss: float) -> None:
        """A few in a week are nothing; many in a row of one network are its end."""
        self.nonfinite_updates += 1
        in_a_row = self._nonfinite_in_a_row.get(name, 0) + 1
        self._nonfinite_in_a_row[name] = in_a_row
        if in_a_row > self.networks.settings.max_nonfinite_updates:
            raise DivergedError(
                f"{in_a_row} updates of the {name} in a row had a gradient that was not finite "
                f"(the last loss: {loss}); more than train.max_nonfinite_updates allows. Begin "
                "another run.dir with a lower train.learning_rate or train.max_grad_norm, or a "
                "higher train.fake_updates; or let train.health roll back on nonfinite_updates"
            )


def _given(samples: Samples) -> Samples:
    return samples
