"""Station 6, the generator's step. Oracle: autograd through the same loss, written by hand."""

from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import DDIMScheduler

from dmd_core.condition import Condition
from dmd_core.denoiser import NetworkDenoiser
from dmd_core.fake_score import FakeScore
from dmd_core.losses import regression_distance
from dmd_core.schedule import Schedule
from dmd_core.student import Student
from dmd_core.train_step import LossSettings, PairedPart, draw_times, generator_step
from tests.dmd_core.small_networks import (
    SmallNetwork,
    gradients,
    judging_network,
    labels,
    normal,
    step_noise,
)

VP = Schedule.from_scheduler(
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
    )
)
FAMILIES = {"vp": VP, "flow": Schedule.flow(shift=3.0), "edm": Schedule.edm(sigma_max=5.0)}
FEW_STEPS = (999, 749, 499, 249)
B, P = 3, 2
COND, PAIRED = labels(B, 20), PairedPart(normal(P, 21), normal(P, 22), labels(P, 23))
WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])  # of samples: a per-sample loss must keep them


class Setup:
    """G, teacher and F with head, all of them willing to take gradients."""

    def __init__(self, schedule: Schedule = VP, timesteps: tuple[int, ...] = (999,)) -> None:
        self.g, self.teacher, self.f = SmallNetwork(0), SmallNetwork(1), judging_network(2)
        self.schedule = schedule
        self.student = Student(NetworkDenoiser(self.g, schedule), timesteps)
        self.real = NetworkDenoiser(self.teacher, schedule)
        self.fake = FakeScore(self.f, schedule)

    def step(self, settings: LossSettings, noise, *, paired=PAIRED, **options):
        return generator_step(
            self.student, self.real, self.fake, noise, COND, paired, settings,
            discriminator=self.fake.judge, **options,
        )  # fmt: skip


def _assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert any(bool((g != 0).any()) for g in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pairs_in_dm", [False, True])
def test_gradients_reach_the_generator_alone(pairs_in_dm):
    setup = Setup()
    settings = LossSettings(gan=1.0, pairs_in_dm=pairs_in_dm)
    result = setup.step(settings, step_noise(B, paired=P if pairs_in_dm else 0))
    assert setup.teacher.recorded == [False]
    assert setup.f.network.recorded == [False, True]  # its score; its judgement of x
    for loss in (result.loss_dm, result.loss_reg, result.loss_gan):
        setup.g.zero_grad(set_to_none=True)
        loss.sum().backward(retain_graph=True)
        assert all(bool((w.grad != 0).any()) for w in setup.g.parameters())
    for network in (setup.teacher, setup.f):
        assert all(w.requires_grad and w.grad is None for w in network.parameters())
    assert not result.x.requires_grad


@pytest.mark.parametrize("family", list(FAMILIES))
def test_distribution_matching_term_is_the_gradient_through_x(family):
    """∂/∂θ of Σ_b c_b g_b·x_b / (C·H·W), with g from scores of the teacher and of F."""
    setup, noise = Setup(FAMILIES[family]), step_noise(B)
    schedule = setup.schedule
    result = setup.step(LossSettings(t_min_fraction=0.1, t_max_fraction=0.6), noise, paired=None)

    x = setup.student(noise.z[0], COND)
    t = (100 + noise.u_dm * 500).long()
    alpha, sigma = schedule.coefficients(t, x)
    with torch.no_grad():
        x_t = (alpha * x + sigma * noise.eps_dm).float()
        x0_real, x0_fake = setup.real(x_t, t, COND), setup.fake(x_t, t, COND)
        g = (x0_fake - x0_real) / (x - x0_real).abs().mean(dim=(1, 2, 3), keepdim=True)
    expected = (WEIGHTS[:B] * (g * x).mean(dim=(1, 2, 3))).sum()
    _assert_same(
        gradients((WEIGHTS[:B] * result.loss_dm).sum(), setup.g), gradients(expected, setup.g)
    )
    torch.testing.assert_close(result.loss_dm, 0.5 * g.square().mean((1, 2, 3)), rtol=1e-4, atol=0)
    norm = (g / g[0].numel()).flatten(1).norm(dim=1).mean()
    assert float(result.output_norms["dm"].mean()) == pytest.approx(float(norm), rel=1e-4)
    assert torch.equal(result.x, x.detach()) and result.cond is COND and result.non_finite == 0


def test_weighting_setting_reaches_the_gradient():
    setup, noise = Setup(FAMILIES["flow"]), step_noise(B)
    result = setup.step(LossSettings(dm_weighting="sigma3_over_alpha"), noise, paired=None)
    t = draw_times(noise.u_dm, setup.schedule, 0.02, 0.98)
    x_t = setup.schedule.diffuse(result.x, noise.eps_dm, t)
    alpha, sigma = setup.schedule.coefficients(t, x_t)
    g = alpha * sigma * (setup.fake(x_t, t, COND) - setup.real(x_t, t, COND)).detach()
    expected = 0.5 * g.square().mean((1, 2, 3)).float()
    torch.testing.assert_close(result.loss_dm, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["l1", "l2", "huber", "given"])
def test_regression_term_equals_plain_autograd(kind):
    def squared_root(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x - y).square() + 0.01).sqrt().mean(dim=(1, 2, 3))

    setup, noise = Setup(), step_noise(B)
    settings = LossSettings(dm=0.0, regression="l2" if kind == "given" else kind)
    distance = squared_root if kind == "given" else None
    result = setup.step(settings, noise, distance=distance)
    plain = (distance or regression_distance(kind))(
        setup.student(PAIRED.eps, PAIRED.cond), PAIRED.y
    )
    torch.testing.assert_close(result.loss_reg, plain)
    _assert_same(
        gradients((WEIGHTS[:P] * result.loss_reg).sum(), setup.g),
        gradients((WEIGHTS[:P] * plain).sum(), setup.g),
    )
    assert result.loss_dm.shape == result.loss_gan.shape == (0,)
    assert set(result.output_norms) == {"reg"}


def test_gan_term_equals_plain_autograd():
    setup, noise = Setup(), step_noise(B)
    result = setup.step(LossSettings(dm=0.0, reg=0.0, gan=1.0), noise)
    t = (noise.u_gan * 1000).long()
    x = setup.student(noise.z[0], COND)
    alpha, sigma = VP.coefficients(t, x)
    x_t = (alpha * x + sigma * noise.eps_gan).float()
    plain = -torch.sigmoid(setup.fake.judge(x_t, t, COND)).log()
    torch.testing.assert_close(result.loss_gan, plain)
    _assert_same(
        gradients((WEIGHTS[:B] * result.loss_gan).sum(), setup.g),
        gradients((WEIGHTS[:B] * plain).sum(), setup.g),
    )
    with pytest.raises(ValueError, match="needs a discriminator and its noise"):
        setup.step(LossSettings(gan=1.0), replace(noise, u_gan=None))


@pytest.mark.parametrize("pairs_in_dm", [False, True])
def test_pairs_feed_distribution_matching_when_asked(pairs_in_dm):
    setup, noise = Setup(), step_noise(B, paired=P if pairs_in_dm else 0)
    result = setup.step(LossSettings(pairs_in_dm=pairs_in_dm), noise)
    assert len(setup.g.calls) == 1  # fresh noise and stored noise in one forward pass
    x, x_ref = setup.student(noise.z[0], COND), setup.student(PAIRED.eps, PAIRED.cond)
    expected = torch.cat([x, x_ref]) if pairs_in_dm else x
    torch.testing.assert_close(result.x, expected.detach(), rtol=1e-5, atol=1e-6)
    cond = Condition.cat(COND, PAIRED.cond) if pairs_in_dm else COND
    assert torch.equal(result.cond.labels, cond.labels)
    # The term of a sample does not depend on the samples beside it.
    t = draw_times(noise.u_dm, VP, 0.02, 0.98)
    for row, sample in enumerate(result.x.unbind()):
        one = slice(row, row + 1)
        x_t = VP.diffuse(sample[None], noise.eps_dm[one], t[one])
        x0_real, x0_fake = (
            f(x_t, t[one], cond.rows(one))[0].detach() for f in (setup.real, setup.fake)
        )
        g = (x0_fake - x0_real) / (sample - x0_real).abs().mean()
        torch.testing.assert_close(
            result.loss_dm[row], 0.5 * g.square().mean(), rtol=1e-4, atol=1e-6
        )


# ---------------------------------------------------------------------- the student's steps


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_few_step_student_trains_on_its_own_renoised_outputs(family, step):
    setup, noise = Setup(FAMILIES[family], FEW_STEPS), step_noise(B, steps=4)
    schedule = setup.schedule
    result = setup.step(LossSettings(reg=0.0), noise, paired=None, step=step)
    assert len(setup.g.calls) == step + 1
    assert setup.g.recorded == [False] * step + [True]
    assert not any(x_in.requires_grad for x_in, _, _ in setup.g.calls)

    x_t = noise.z[0] * {"vp": 1.0, "flow": 1.0, "edm": 5.0}[family]
    denoise = NetworkDenoiser(setup.g, schedule)
    for k in range(step):
        now, later = (torch.full((B,), time) for time in FEW_STEPS[k : k + 2])
        with torch.no_grad():
            x0 = denoise(x_t, now, COND)
        alpha, sigma = (
            c[later].float().view(B, 1, 1, 1) for c in (schedule.alphas, schedule.sigmas)
        )
        fresh = alpha * x0 + sigma * noise.z[k + 1]
        if family == "edm":  # what x_t has of the later noise is kept, the posterior of x_s
            r = (schedule.sigmas[later] / schedule.sigmas[now]).float().view(B, 1, 1, 1)
            fresh = x0 + r**2 * (x_t - x0) + sigma * (1 - r**2).sqrt() * noise.z[k + 1]
        x_t = fresh
    x = denoise(x_t, torch.full((B,), FEW_STEPS[step]), COND)
    torch.testing.assert_close(result.x, x.detach(), rtol=1e-5, atol=1e-5)

    t = draw_times(noise.u_dm, schedule, 0.02, 0.98)
    diffused = schedule.diffuse(x.detach(), noise.eps_dm, t)
    x0_real, x0_fake = (f(diffused, t, COND).detach() for f in (setup.real, setup.fake))
    g = (x0_fake - x0_real) / (x.detach() - x0_real).abs().mean(dim=(1, 2, 3), keepdim=True)
    _assert_same(gradients(result.loss_dm.sum(), setup.g),
                 gradients((g * x).mean(dim=(1, 2, 3)).sum(), setup.g))  # fmt: skip
    if step == 3:
        torch.testing.assert_close(setup.student.sample(noise.z, COND), result.x)


def test_pairs_regress_the_first_step_whichever_step_is_trained():
    setup, noise = Setup(timesteps=FEW_STEPS), step_noise(B, steps=4)
    result = setup.step(LossSettings(dm=0.0), noise, step=2)
    _, time, _ = setup.g.calls[-1]
    assert time.tolist() == [499] * B + [999] * P
    expected = regression_distance("l2")(setup.student(PAIRED.eps, PAIRED.cond), PAIRED.y)
    torch.testing.assert_close(result.loss_reg, expected)


def test_one_step_student_may_be_told_an_earlier_time():
    setup, noise = Setup(timesteps=(399,)), step_noise(B)
    result = setup.step(LossSettings(), noise)
    x_in, time, _ = setup.g.calls[0]
    assert time.tolist() == [399] * (B + P)
    assert torch.equal(x_in, torch.cat([noise.z[0], PAIRED.eps]))
    alpha, sigma = VP.alphas[399], VP.sigmas[399]
    expected = alpha * x_in - sigma * setup.g(x_in, time, Condition.cat(COND, PAIRED.cond))
    torch.testing.assert_close(result.x, expected[:B].detach().float())


@pytest.mark.parametrize("times", [(), (1000,), (-1,), (500, 500), (249, 999)])
def test_student_times_fall_and_lie_on_the_grid(times):
    with pytest.raises(ValueError, match=r"expected falling times in \[0, 1000\)"):
        Student(NetworkDenoiser(SmallNetwork(0), VP), times)


# ---------------------------------------------------------------------- what is not finite


@dataclass(frozen=True)
class Broken:
    """A denoiser whose output is `value` in some places."""

    denoiser: NetworkDenoiser
    places: tuple[tuple[int, ...], ...]
    value: float
    schedule: Schedule = VP

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        x0 = self.denoiser(x_t, t, cond).detach().clone()
        for place in self.places:
            x0[place] = self.value
        return x0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_entries_of_the_matching_gradient_that_are_not_finite_count_as_zero(value):
    setup, noise = Setup(), step_noise(B)
    whole = setup.step(LossSettings(), noise, paired=None)
    places = ((0, 0, 1, 2), (0, 1, 3, 3), (2, 0, 0, 0))
    setup.fake = Broken(NetworkDenoiser(setup.f.network, VP), places, value)
    found = generator_step(setup.student, setup.real, setup.fake, noise, COND, None, LossSettings())
    assert whole.non_finite == 0 and found.non_finite == 3
    assert found.loss_dm.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(found.loss_dm.sum(), setup.g))
    # By entry: the surrogate's value at a sample is ½ mean g².
    torch.testing.assert_close(found.loss_dm[1], whole.loss_dm[1])
    assert found.loss_dm[0] < whole.loss_dm[0] and found.loss_dm[2] < whole.loss_dm[2]
    assert 0 < found.output_norms["dm"].mean() < whole.output_norms["dm"].mean()


def test_a_teacher_that_is_not_finite_silences_its_sample_alone():
    """The normaliser takes the whole sample with it."""
    setup, noise = Setup(), step_noise(B)
    whole = setup.step(LossSettings(), noise, paired=None)
    setup.real = Broken(setup.real, ((1, 0, 0, 0),), torch.nan)
    found = setup.step(LossSettings(), noise, paired=None)
    assert found.non_finite == found.x[0].numel()
    assert found.loss_dm[1] == 0
    torch.testing.assert_close(found.loss_dm[[0, 2]], whole.loss_dm[[0, 2]])


def test_entries_of_the_other_gradients_that_are_not_finite_count_as_zero():
    """A distance whose slope at x is y."""

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * y).sum(dim=(1, 2, 3))

    setup, noise = Setup(), step_noise(B)
    y = torch.ones_like(PAIRED.y)
    y[1, 0, 0, 0], y[1, 1, 2, 2] = torch.inf, torch.nan
    paired = replace(PAIRED, y=y)
    found = setup.step(LossSettings(dm=0.0), noise, paired=paired, distance=distance)
    assert found.non_finite == 2
    x = setup.student(PAIRED.eps, PAIRED.cond)
    expected = gradients((x * y.nan_to_num(0.0, 0.0, 0.0)).sum(), setup.g)
    _assert_same(gradients(found.loss_reg.sum(), setup.g), expected)
    norm = y.nan_to_num(0.0, 0.0, 0.0).flatten(1).norm(dim=1).mean()
    assert float(found.output_norms["reg"].mean()) == pytest.approx(float(norm))
