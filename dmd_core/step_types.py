"""What goes into the two steps of `train_step.py` and what comes out. Pictures and latents are
(B,C,h,w)."""

from dataclasses import dataclass

import torch

from dmd_core.condition import Condition
from dmd_core.losses import DmWeighting
from dmd_core.schedule import ScoreWeight


@dataclass(frozen=True)
class LossSettings:
    """`dm`, `reg` (the paper's λ) and `gan` weight the generator's losses; 0 leaves one out.

    Times of the distribution-matching gradient are uniform in [t_min_fraction, t_max_fraction)·T;
    those of the fake score and of the GAN in all of [0, T). `pairs_in_dm`: the student's outputs
    on the stored noise feed the distribution-matching term too (the LAION variant of Algorithm 1).
    """

    dm: float = 1.0
    reg: float = 0.25
    gan: float = 0.0
    regression: str = "l2"
    dm_weighting: DmWeighting = "normalised"
    score_weight: ScoreWeight = "teacher"
    t_min_fraction: float = 0.02
    t_max_fraction: float = 0.98
    pairs_in_dm: bool = False


@dataclass(frozen=True)
class StepNoise:
    """All random numbers of one update, drawn outside and keyed by sample.

    `z`: the student's input ε and its re-noisings, one (B,C,h,w) for each of its steps. For the
    distribution-matching gradient, the fake-score loss and the GAN: ε and u ∈ [0, 1). Those of
    `dm` and `fake` have B rows, or B + P where the P pairs feed the distribution-matching term.
    """

    z: tuple[torch.Tensor, ...]
    eps_dm: torch.Tensor
    u_dm: torch.Tensor
    eps_fake: torch.Tensor
    u_fake: torch.Tensor
    eps_gan: torch.Tensor | None = None
    u_gan: torch.Tensor | None = None

    def rows(self, fresh: slice, paired: slice) -> "StepNoise":
        """Those of some of the fresh samples and some of the pairs; what is empty stays empty."""
        count = len(self.z[0])

        def part(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor[:count][fresh], tensor[count:][paired]])

        return StepNoise(
            z=tuple(z[fresh] for z in self.z),
            eps_dm=part(self.eps_dm),
            u_dm=part(self.u_dm),
            eps_fake=part(self.eps_fake),
            u_fake=part(self.u_fake),
            eps_gan=None if self.eps_gan is None else self.eps_gan[fresh],
            u_gan=None if self.u_gan is None else self.u_gan[fresh],
        )


@dataclass(frozen=True)
class PairedPart:
    """The teacher's own pairs: ε (P,C,h,w), its latents y alike, and their conditions."""

    eps: torch.Tensor
    y: torch.Tensor
    cond: Condition

    def rows(self, rows: slice) -> "PairedPart":
        return PairedPart(self.eps[rows], self.y[rows], self.cond.rows(rows))


@dataclass(frozen=True)
class GeneratorStep:
    """Per-sample losses of the generator, attached to G's graph: `loss_dm` (B,) or (B+P,),
    `loss_reg` (P,), `loss_gan` (B,); empty where a loss is off.

    `x` is the student's output, detached, with its `cond`: what the fake score trains on.
    `output_norms`: norm of each loss's gradient at x, one per sample, before weighting.
    `non_finite`: entries of those gradients that were NaN or infinite and count as zero.
    """

    loss_dm: torch.Tensor
    loss_reg: torch.Tensor
    loss_gan: torch.Tensor
    x: torch.Tensor
    cond: Condition
    output_norms: dict[str, torch.Tensor]
    non_finite: torch.Tensor


@dataclass(frozen=True)
class Pictures:
    """Real pictures for the GAN, and the noise both sides are judged at (DMD2 §4.3).

    `x` (B,C,h,w) with `cond`; ε and u ∈ [0, 1) for them (`eps`, `u`) and for the student's samples
    (`eps_x`, `u_x`); `eps_r1` the direction of the R1 difference (None: no R1).
    """

    x: torch.Tensor
    cond: Condition
    eps: torch.Tensor
    u: torch.Tensor
    eps_x: torch.Tensor
    u_x: torch.Tensor
    eps_r1: torch.Tensor | None = None

    def rows(self, rows: slice) -> "Pictures":
        return Pictures(
            x=self.x[rows],
            cond=self.cond.rows(rows),
            eps=self.eps[rows],
            u=self.u[rows],
            eps_x=self.eps_x[rows],
            u_x=self.u_x[rows],
            eps_r1=None if self.eps_r1 is None else self.eps_r1[rows],
        )


@dataclass(frozen=True)
class Unpaired:
    """Conditions and fresh noise of this worker's part of one global batch; `pictures` for the
    discriminator, in as many rows; `student_step`: which of the student's steps makes x."""

    cond: Condition
    noise: StepNoise
    pictures: Pictures | None = None
    student_step: int = 0

    def rows(self, fresh: slice, paired: slice) -> "Unpaired":
        pictures = self.pictures if fresh.stop > fresh.start else None
        pictures = None if pictures is None else pictures.rows(fresh)
        cond, noise = self.cond.rows(fresh), self.noise.rows(fresh, paired)
        return Unpaired(cond, noise, pictures, self.student_step)


@dataclass(frozen=True)
class StepData:
    """One iteration: the first of `unpaired` serves the generator and the first fake update, the
    others one more fake update each."""

    unpaired: tuple[Unpaired, ...]
    paired: PairedPart | None

    def pieces(self, fresh: int, paired: int) -> "tuple[StepData, ...]":
        """Cut for gradient accumulation: the fresh samples into `fresh` pieces and the pairs into
        `paired`, whose sizes differ by one at most. The last pieces have some of both."""
        count = max(fresh, paired)
        rows = len(self.unpaired[0].noise.z[0])
        pair_rows = 0 if self.paired is None else len(self.paired.eps)
        return tuple(
            self._piece(_cut(rows, fresh, count, index), _cut(pair_rows, paired, count, index))
            for index in range(count)
        )

    def _piece(self, fresh: slice, pairs: slice) -> "StepData":
        paired = self.paired.rows(pairs) if self.paired and pairs.stop > pairs.start else None
        return StepData(tuple(part.rows(fresh, pairs) for part in self.unpaired), paired)


def _cut(rows: int, pieces: int, count: int, index: int) -> slice:
    """The rows of piece `index` of `count`, where only the last `pieces` have any."""
    place = index - (count - pieces)
    if place < 0:
        return slice(0, 0)
    return slice(rows * place // pieces, rows * (place + 1) // pieces)


@dataclass(frozen=True)
class FakeStep:
    """Per-sample losses of the fake score at its times `t` (B,) or (B+P,), and of the
    discriminator and its R1 penalty, (B,) or empty."""

    loss_score: torch.Tensor
    loss_gan: torch.Tensor
    loss_r1: torch.Tensor
    t: torch.Tensor
