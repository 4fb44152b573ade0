"""One DMD iteration (Algorithm 1): a generator update, then a fake-score update.

This is the whole method on one screen. No loop, no files, no Ray. Which gradients flow where:
the generator step reaches only G; the fake-score step reaches only F; the teacher is never
trained and, with F, runs under no-grad inside the generator step.
"""

from dataclasses import dataclass

import torch

from dmd_core.denoiser import Denoiser
from dmd_core.losses import (
    distribution_matching_loss,
    dmd_gradient,
    fake_score_loss,
    regression_loss,
)
from dmd_core.student import OneStepStudent


@dataclass(frozen=True)
class DmdWeights:
    """`dm` and `reg` (the paper's λ) weight the two generator losses; times are fractions of T."""

    dm: float = 1.0
    reg: float = 0.25
    regression: str = "l2"
    t_min_fraction: float = 0.02
    t_max_fraction: float = 0.98


@dataclass(frozen=True)
class StepNoise:
    """All random numbers of one iteration, drawn outside and keyed by sample.

    `eps_*` are (B,C,h,w), `u_*` (B,) in [0, 1): z for the student's input, `eps_dm`/`u_dm` for the
    distribution-matching gradient, `eps_fake`/`u_fake` for the fake-score loss.
    """

    z: torch.Tensor
    eps_dm: torch.Tensor
    u_dm: torch.Tensor
    eps_fake: torch.Tensor
    u_fake: torch.Tensor


@dataclass(frozen=True)
class PairedPart:
    """The teacher's own pairs: ε (P,C,h,w), its latents y alike, and their text (P,L,D)."""

    eps: torch.Tensor
    y: torch.Tensor
    cond: torch.Tensor


@dataclass(frozen=True)
class GeneratorStep:
    """Per-sample losses of the generator: `loss_dm` (B,), `loss_reg` (P,); `x` (B,C,h,w) is
    the student's output, detached, for the fake-score step."""

    loss_dm: torch.Tensor
    loss_reg: torch.Tensor
    x: torch.Tensor


def generator_step(
    student: OneStepStudent,
    real: Denoiser,
    fake: Denoiser,
    noise: StepNoise,
    cond: torch.Tensor,
    paired: PairedPart | None,
    weights: DmdWeights,
) -> GeneratorStep:
    """The generator's two losses, before weighting and averaging (lines 4-9 of Algorithm 1)."""
    # One forward pass for both streams, so that DDP synchronises once.
    if paired is None:
        x, x_ref = student(noise.z, cond), noise.z[:0]
    else:
        both = student(torch.cat([noise.z, paired.eps]), torch.cat([cond, paired.cond]))
        x, x_ref = both[: len(noise.z)], both[len(noise.z) :]

    loss_dm = torch.zeros(len(x), device=x.device)
    if weights.dm > 0:
        with torch.no_grad():
            t = _times(noise.u_dm, real, weights.t_min_fraction, weights.t_max_fraction)
            x_t = real.schedule.diffuse(x.detach(), noise.eps_dm, t)
            gradient = dmd_gradient(x.detach(), real(x_t, t, cond), fake(x_t, t, cond))
        loss_dm = distribution_matching_loss(x, gradient)

    loss_reg = torch.zeros(0, device=x.device)
    if paired is not None:
        loss_reg = regression_loss(x_ref, paired.y, weights.regression)
    return GeneratorStep(loss_dm, loss_reg, x.detach())


def fake_score_step(
    fake: Denoiser, x: torch.Tensor, noise: StepNoise, cond: torch.Tensor
) -> torch.Tensor:
    """Per-sample loss (B,) of the fake score on the student's samples x, at every time."""
    t = _times(noise.u_fake, fake, 0.0, 1.0)
    x_t = fake.schedule.diffuse(x, noise.eps_fake, t)
    return fake_score_loss(fake(x_t, t, cond), x, fake.schedule.snr(t))


def _times(u: torch.Tensor, denoiser: Denoiser, low: float, high: float) -> torch.Tensor:
    """Uniform integer times in [low·T, high·T): (B,) int64."""
    total = denoiser.schedule.num_timesteps
    first, last = round(low * total), round(high * total)
    return (first + u * (last - first)).long().clamp(max=total - 1)
