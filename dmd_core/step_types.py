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


@dataclass(frozen=True)
class PairedPart:
    """The teacher's own pairs: ε (P,C,h,w), its latents y alike, and their conditions."""

    eps: torch.Tensor
    y: torch.Tensor
    cond: Condition


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
    non_finite: int


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


@dataclass(frozen=True)
class FakeStep:
    """Per-sample losses of the fake score at its times `t` (B,) or (B+P,), and of the
    discriminator and its R1 penalty, (B,) or empty."""

    loss_score: torch.Tensor
    loss_gan: torch.Tensor
    loss_r1: torch.Tensor
    t: torch.Tensor
