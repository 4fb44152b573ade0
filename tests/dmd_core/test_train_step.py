"""Station 6 in motion. Oracles: Gaussians whose exact scores are known, and who gets gradients."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from dmd_core.denoiser import GuidedDenoiser, NetworkDenoiser
from dmd_core.schedule import Schedule
from dmd_core.student import OneStepStudent
from dmd_core.train_step import DmdWeights, PairedPart, StepNoise, fake_score_step, generator_step
from tests.dmd_core.gaussian import GaussianDenoiser

SCHEDULE = Schedule.from_scheduler(
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
)
SHAPE = (1, 4, 4)


class AffineStudent(nn.Module):
    """A denoiser whose one-step student is N(shift, scale²)."""

    schedule = SCHEDULE

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = (
            nn.Parameter(torch.tensor(scale)),
            nn.Parameter(torch.tensor(shift)),
        )

    def forward(self, x_t, t, cond):
        return self.scale * x_t + self.shift


class LearnedMean(nn.Module):
    """The exact denoiser of N(mean, 0.5²) with a mean to be learned."""

    schedule = SCHEDULE

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, x_t, t, cond):
        alpha, sigma = SCHEDULE.coefficients(t, x_t)
        k = alpha**2 * 0.25 / (alpha**2 * 0.25 + sigma**2)
        return (self.mean + k / alpha * (x_t - alpha * self.mean)).float()


def _noise(count: int, generator: torch.Generator) -> StepNoise:
    def normal():
        return torch.randn(count, *SHAPE, generator=generator)

    def uniform():
        return torch.rand(count, generator=generator, dtype=torch.float64)

    return StepNoise(normal(), normal(), uniform(), normal(), uniform())


def test_the_student_converges_to_the_teacher_s_distribution():
    teacher_mean, teacher_std = -0.4, 0.5
    network = AffineStudent(scale=1.2, shift=0.9)
    student, real = OneStepStudent(network), GaussianDenoiser(SCHEDULE, teacher_mean, teacher_std)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    generator, cond = torch.Generator().manual_seed(0), torch.zeros(64, 1, 1)
    for _ in range(300):
        # A fake score that is always right: the exact denoiser of the student as it is now.
        fake = GaussianDenoiser(SCHEDULE, float(network.shift), abs(float(network.scale)))
        result = generator_step(
            student, real, fake, _noise(64, generator), cond, None, DmdWeights(reg=0.0)
        )
        optimizer.zero_grad()
        result.loss_dm.mean().backward()
        optimizer.step()
    assert abs(float(network.shift) - teacher_mean) < 0.06
    assert abs(abs(float(network.scale)) - teacher_std) < 0.06


def test_the_fake_score_learns_the_student_s_mean():
    fake = LearnedMean(0.0)
    optimizer = torch.optim.Adam(fake.parameters(), lr=0.02)
    generator, cond = torch.Generator().manual_seed(0), torch.zeros(64, 1, 1)
    for _ in range(200):
        x = 0.8 + 0.5 * torch.randn(64, *SHAPE, generator=generator)
        loss = fake_score_step(fake, x, _noise(64, generator), cond).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(float(fake.mean) - 0.8) < 0.05


def test_regression_alone_recovers_the_teacher_s_map():
    network = AffineStudent(scale=1.0, shift=0.0)
    eps = torch.randn(256, *SHAPE)
    paired = PairedPart(eps, 0.3 * eps - 0.2, torch.zeros(256, 1, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    noise, cond = _noise(1, torch.Generator()), torch.zeros(1, 1, 1)
    for _ in range(200):
        result = generator_step(
            OneStepStudent(network), network, network, noise, cond, paired, DmdWeights(dm=0.0)
        )
        optimizer.zero_grad()
        result.loss_reg.mean().backward()
        optimizer.step()
    assert float(network.scale) == pytest.approx(0.3, abs=1e-2)
    assert float(network.shift) == pytest.approx(-0.2, abs=1e-2)


def test_gradients_reach_only_the_network_being_trained():
    student_net, teacher, fake = AffineStudent(1.0, 0.5), LearnedMean(0.0), LearnedMean(0.5)
    noise, cond = _noise(8, torch.Generator().manual_seed(1)), torch.zeros(8, 1, 1)
    result = generator_step(
        OneStepStudent(student_net), teacher, fake, noise, cond, None, DmdWeights(reg=0.0)
    )
    result.loss_dm.sum().backward()
    assert student_net.shift.grad is not None and student_net.shift.grad != 0
    assert teacher.mean.grad is None and fake.mean.grad is None

    student_net.zero_grad(set_to_none=True)
    fake_score_step(fake, result.x, noise, cond).sum().backward()
    assert fake.mean.grad is not None and fake.mean.grad != 0
    assert student_net.shift.grad is None and teacher.mean.grad is None


def test_times_stay_in_their_range():
    seen: list[torch.Tensor] = []

    class Recorder(LearnedMean):
        def forward(self, x_t, t, cond):
            seen.append(t)
            return super().forward(x_t, t, cond)

    generator, cond = torch.Generator().manual_seed(0), torch.zeros(4000, 1, 1)
    recorder = Recorder(0.0)
    generator_step(
        OneStepStudent(AffineStudent(1.0, 0.0)), recorder, LearnedMean(0.1),
        _noise(4000, generator), cond, None, DmdWeights(reg=0.0),
    )  # fmt: skip
    assert 20 <= seen[0].min() <= 25 and 974 <= seen[0].max() < 980
    fake_score_step(recorder, torch.randn(4000, *SHAPE), _noise(4000, generator), cond)
    assert seen[1].min() <= 5 and 994 <= seen[1].max() < 1000


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_guided_x0_equals_guidance_of_the_raw_output(prediction_type, scale):
    schedule = Schedule(SCHEDULE.alphas, SCHEDULE.sigmas, prediction_type)

    x_t, t = torch.randn(3, *SHAPE), torch.tensor([0, 500, 999])
    cond, uncond = torch.randn(1, 2, 2).expand(3, 2, 2), torch.randn(1, 2, 2)

    def raw(c):
        return x_t * 0.5 + c.mean(dim=(1, 2)).view(-1, 1, 1, 1)

    denoiser = NetworkDenoiser(
        lambda x, t, c: x * 0.5 + c.mean(dim=(1, 2)).view(-1, 1, 1, 1), schedule
    )
    mixed = raw(uncond.expand(3, 2, 2)) + scale * (raw(cond) - raw(uncond.expand(3, 2, 2)))
    expected = schedule.x0_from_output(mixed, x_t, t)
    ours = GuidedDenoiser(denoiser, scale, uncond)(x_t, t, cond)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
