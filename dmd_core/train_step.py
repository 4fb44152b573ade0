"""The whole method on one screen: a generator step and a fake-score step (DMD Algorithm 1, DMD2).

No loop, no files, no Ray, no random numbers of its own. Which gradients flow where: the generator
step reaches only G; the fake-score step reaches only F and the discriminator's head; the teacher
is never trained. Every loss is first differentiated at the student's output x, where its
non-finite entries are counted and set to zero; then G is differentiated once.
"""

from collections.abc import Callable

import torch

from dmd_core.condition import Condition
from dmd_core.denoiser import Denoiser
from dmd_core.fake_score import FakeScore
from dmd_core.losses import (
    Distance,
    distribution_matching_loss,
    dmd_gradient,
    fake_score_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    r1_penalty,
    regression_distance,
)
from dmd_core.output_gradient import Term, differentiate, finite
from dmd_core.schedule import Schedule
from dmd_core.step_types import (
    FakeStep,
    GeneratorStep,
    LossSettings,
    PairedPart,
    Pictures,
    StepNoise,
)
from dmd_core.student import Student

# (x_t, t, cond) → logits (B,): is it real?
Discriminator = Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor]
R1_SIGMA = 0.1  # step of the R1 difference, of latents with unit variance


def generator_step(
    student: Student,
    real: Denoiser,
    fake: Denoiser,
    noise: StepNoise,
    cond: Condition,
    paired: PairedPart | None,
    settings: LossSettings,
    *,
    step: int = 0,
    distance: Distance | None = None,
    discriminator: Discriminator | None = None,
) -> GeneratorStep:
    """The generator's losses on one batch (lines 4-9 of Algorithm 1; DMD2 §4).

    `step`: which of the student's steps is trained; its input comes from the student's own rollout
    (DMD2 §4.5). `distance` takes the place of `settings.regression` (LPIPS on decoded pixels).
    """
    x, x_ref = _student_outputs(student, noise, cond, paired, step)
    x_dm, cond_dm = x, cond
    if settings.pairs_in_dm and paired is not None:
        x_dm, cond_dm = torch.cat([x, x_ref]), Condition.cat(cond, paired.cond)

    terms: dict[str, Term] = {}
    if settings.dm > 0 and len(x_dm):
        g = _matching_gradient(real, fake, x_dm.detach(), cond_dm, noise, settings)
        loss = distribution_matching_loss(x_dm, finite(g))
        terms["dm"] = Term(loss, g / x.shape[1:].numel())
    if settings.reg > 0 and paired is not None:
        measure = distance or regression_distance(settings.regression)
        terms["reg"] = differentiate(lambda out: measure(out, paired.y), x_ref)
    if settings.gan > 0 and len(x):
        if discriminator is None or noise.eps_gan is None or noise.u_gan is None:
            raise ValueError("a GAN weight above 0 needs a discriminator and its noise")
        t_gan = draw_times(noise.u_gan, real.schedule)
        eps_gan, judge = noise.eps_gan, discriminator

        def fooled(out: torch.Tensor) -> torch.Tensor:
            return gan_generator_loss(
                judge(real.schedule.diffuse(out, eps_gan, t_gan), t_gan, cond)
            )

        terms["gan"] = differentiate(fooled, x)
    losses = {name: term.loss for name, term in terms.items()}
    nothing = x.new_zeros(0)
    return GeneratorStep(
        loss_dm=losses.get("dm", nothing),
        loss_reg=losses.get("reg", nothing),
        loss_gan=losses.get("gan", nothing),
        x=x_dm.detach(),
        cond=cond_dm,
        output_norms={name: term.norms for name, term in terms.items()},
        non_finite=sum((term.non_finite for term in terms.values()), x.new_zeros(())),
    )


def fake_score_step(
    fake: Denoiser,
    x: torch.Tensor,
    noise: StepNoise,
    cond: Condition,
    settings: LossSettings,
    *,
    pictures: Pictures | None = None,
) -> FakeStep:
    """The fake score on the student's samples x, at every time (line 11 of Algorithm 1); with
    `pictures` also the discriminator, in the same forward pass (DMD2 §4.3)."""
    schedule = fake.schedule
    t = draw_times(noise.u_fake, schedule)
    x_t = schedule.diffuse(x, noise.eps_fake, t)
    weight = schedule.score_weight(t, settings.score_weight)
    nothing = x.new_zeros(0)
    if pictures is None:
        loss = fake_score_loss(fake(x_t, t, cond), x, weight)
        return FakeStep(loss, nothing, nothing, t)
    if not isinstance(fake, FakeScore):
        raise TypeError(f"{type(fake).__name__} has no discriminator; expected a FakeScore")

    t_x, t_real = (draw_times(u, schedule) for u in (pictures.u_x, pictures.u))
    count = len(t_x)  # samples beyond these are the student's outputs on stored pairs
    if len(pictures.x) != count:
        raise ValueError(f"{len(pictures.x)} real pictures for {count} samples; expected as many")
    judged = [schedule.diffuse(x[:count], pictures.eps_x, t_x)]
    judged += [schedule.diffuse(pictures.x, pictures.eps, t_real)]
    times, conds = [t_x, t_real], [cond.rows(slice(count)), pictures.cond]
    if pictures.eps_r1 is not None:
        judged += [judged[1] + R1_SIGMA * pictures.eps_r1]
        times, conds = [*times, t_real], [*conds, pictures.cond]
    x0, logits = fake.score_and_judge(
        (x_t, t, cond), (torch.cat(judged), torch.cat(times), Condition.cat(*conds))
    )
    logits_x, logits_real, *near = logits.split(count)
    return FakeStep(
        loss_score=fake_score_loss(x0, x, weight),
        loss_gan=gan_discriminator_loss(logits_x, logits_real),
        loss_r1=r1_penalty(logits_real, near[0], R1_SIGMA) if near else nothing,
        t=t,
    )


def draw_times(
    u: torch.Tensor, schedule: Schedule, low: float = 0.0, high: float = 1.0
) -> torch.Tensor:
    """u ∈ [0, 1) → uniform integer times in [low·T, high·T): (B,) int64."""
    first, last = round(low * schedule.num_timesteps), round(high * schedule.num_timesteps)
    return (first + u * (last - first)).long().clamp(max=schedule.num_timesteps - 1)


# ---------------------------------------------------------------------- parts of the above


def _student_outputs(
    student: Student, noise: StepNoise, cond: Condition, paired: PairedPart | None, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x from fresh noise and x_ref from the stored noise, in one forward pass, so that DDP
    synchronises once."""
    x_t = student.rollout(noise.z, cond, step) if len(noise.z[0]) else noise.z[0]
    if paired is None:
        return student.predict(x_t, step, cond), x_t[:0]
    t = torch.cat([student.times(step, x_t), student.times(0, paired.eps)])
    x_in = torch.cat([x_t, student.start(paired.eps)])
    both = student.denoiser(x_in, t, Condition.cat(cond, paired.cond))
    return both[: len(x_t)], both[len(x_t) :]


@torch.no_grad()
def _matching_gradient(
    real: Denoiser,
    fake: Denoiser,
    x: torch.Tensor,
    cond: Condition,
    noise: StepNoise,
    settings: LossSettings,
) -> torch.Tensor:
    t = draw_times(noise.u_dm, real.schedule, settings.t_min_fraction, settings.t_max_fraction)
    x_t = real.schedule.diffuse(x, noise.eps_dm, t)
    alpha_t, sigma_t = real.schedule.coefficients(t, x)
    return dmd_gradient(
        x, real(x_t, t, cond), fake(x_t, t, cond),
        weighting=settings.dm_weighting, alpha_t=alpha_t, sigma_t=sigma_t,
    )  # fmt: skip
