"""Station 6 in motion. Oracles: Gaussians whose exact scores are known, and who gets gradients.

The steps one by one: test_generator_step.py, test_fake_score.py.
"""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from dmd_core.condition import Condition
from dmd_core.schedule import Schedule
from dmd_core.student import Student
from dmd_core.train_step import LossSettings, PairedPart, StepNoise, fake_score_step, generator_step
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

    return StepNoise((normal(),), normal(), uniform(), normal(), uniform())


def test_the_student_converges_to_the_teacher_s_distribution():
    teacher_mean, teacher_std = -0.4, 0.5
    network = AffineStudent(scale=1.2, shift=0.9)
    student, real = Student.one_step(network), GaussianDenoiser(SCHEDULE, teacher_mean, teacher_std)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    generator, cond = torch.Generator().manual_seed(0), Condition()
    for _ in range(300):
        # A fake score that is always right: the exact denoiser of the student as it is now.
        fake = GaussianDenoiser(SCHEDULE, float(network.shift), abs(float(network.scale)))
        result = generator_step(
            student, real, fake, _noise(64, generator), cond, None, LossSettings(reg=0.0)
        )
        optimizer.zero_grad()
        result.loss_dm.mean().backward()
        optimizer.step()
    assert abs(float(network.shift) - teacher_mean) < 0.06
    assert abs(abs(float(network.scale)) - teacher_std) < 0.06


def test_the_fake_score_learns_the_student_s_mean():
    fake = LearnedMean(0.0)
    optimizer = torch.optim.Adam(fake.parameters(), lr=0.02)
    generator, cond = torch.Generator().manual_seed(0), Condition()
    for _ in range(200):
        x = 0.8 + 0.5 * torch.randn(64, *SHAPE, generator=generator)
        loss = fake_score_step(
            fake, x, _noise(64, generator), cond, LossSettings()
        ).loss_score.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(float(fake.mean) - 0.8) < 0.05


def test_regression_alone_recovers_the_teacher_s_map():
    network = AffineStudent(scale=1.0, shift=0.0)
    eps = torch.randn(256, *SHAPE)
    paired = PairedPart(eps, 0.3 * eps - 0.2, Condition())
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    noise, cond = _noise(1, torch.Generator()), Condition()
    for _ in range(200):
        result = generator_step(
            Student.one_step(network), network, network, noise, cond, paired, LossSettings(dm=0.0)
        )
        optimizer.zero_grad()
        result.loss_reg.mean().backward()
        optimizer.step()
    assert float(network.scale) == pytest.approx(0.3, abs=1e-2)
    assert float(network.shift) == pytest.approx(-0.2, abs=1e-2)


def test_gradients_reach_only_the_network_being_trained():
    student_net, teacher, fake = AffineStudent(1.0, 0.5), LearnedMean(0.0), LearnedMean(0.5)
    noise, cond = _noise(8, torch.Generator().manual_seed(1)), Condition()
    result = generator_step(
        Student.one_step(student_net), teacher, fake, noise, cond, None, LossSettings(reg=0.0)
    )
    result.loss_dm.sum().backward()
    assert student_net.shift.grad is not None and student_net.shift.grad != 0
    assert teacher.mean.grad is None and fake.mean.grad is None

    student_net.zero_grad(set_to_none=True)
    fake_score_step(fake, result.x, noise, cond, LossSettings()).loss_score.sum().backward()
    assert fake.mean.grad is not None and fake.mean.grad != 0
    assert student_net.shift.grad is None and teacher.mean.grad is None


def test_times_stay_in_their_range():
    seen: list[torch.Tensor] = []

    class Recorder(LearnedMean):
        def forward(self, x_t, t, cond):
            seen.append(t)
            return super().forward(x_t, t, cond)

    generator, cond = torch.Generator().manual_seed(0), Condition()
    recorder = Recorder(0.0)
    generator_step(
        Student.one_step(AffineStudent(1.0, 0.0)), recorder, LearnedMean(0.1),
        _noise(4000, generator), cond, None, LossSettings(reg=0.0),
    )  # fmt: skip
    assert 20 <= seen[0].min() <= 25 and 974 <= seen[0].max() < 980
    fake_score_step(
        recorder, torch.randn(4000, *SHAPE), _noise(4000, generator), cond, LossSettings()
    )
    assert seen[1].min() <= 5 and 994 <= seen[1].max() < 1000
