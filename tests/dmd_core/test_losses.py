"""Station 6. Oracle: the closed form of Gaussians, with sign and size.

Student N(m, s²) against teacher N(0, s²): x̂_fake − x̂_real = (1 − k) m at every x_t.
"""

import pytest
import torch
from diffusers import DDIMScheduler

from dmd_core.losses import (
    distribution_matching_loss,
    dmd_gradient,
    fake_score_loss,
    regression_loss,
)
from dmd_core.schedule import Schedule
from tests.dmd_core.gaussian import GaussianDenoiser

SCHEDULE = Schedule.from_scheduler(
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
)
COND = torch.zeros(6, 1, 1)


@pytest.mark.parametrize("t_value", [20, 300, 700, 979])
def test_dmd_gradient_equals_the_closed_form_in_sign_and_size(t_value):
    m, s = 0.7, 0.5
    real = GaussianDenoiser(SCHEDULE, 0.0, s)
    fake = GaussianDenoiser(SCHEDULE, m, s)
    x = m + s * torch.randn(6, 4, 8, 8)
    t = torch.full((6,), t_value)
    x_t = SCHEDULE.diffuse(x, torch.randn_like(x), t)
    alpha, sigma = (float(c[0]) for c in SCHEDULE.coefficients(t, x))
    k = alpha**2 * s**2 / (alpha**2 * s**2 + sigma**2)
    x0_real = real(x_t, t, COND)
    expected = torch.full_like(x, (1 - k) * m)
    for row in range(6):  # one normaliser per sample, over channels and space
        expected[row] /= (x[row] - x0_real[row]).abs().mean()
    gradient = dmd_gradient(x, x0_real, fake(x_t, t, COND))
    torch.testing.assert_close(gradient, expected, rtol=2e-4, atol=2e-5)
    # Descent moves the student's mean m > 0 towards the teacher's 0.
    assert (x - 0.1 * gradient).mean() < x.mean()


def test_loss_gradient_is_the_dmd_gradient_over_the_number_of_elements():
    x = torch.randn(3, 4, 8, 8, requires_grad=True)
    gradient = torch.randn(3, 4, 8, 8)
    distribution_matching_loss(x, gradient).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient / gradient[0].numel())


def test_gradient_is_zero_when_fake_equals_real():
    x, prediction = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    assert dmd_gradient(x, prediction, prediction).abs().max() == 0


def test_normaliser_is_per_sample_not_per_batch():
    x = torch.randn(2, 4, 4, 4)
    real, fake = torch.randn_like(x), torch.randn_like(x)
    alone = dmd_gradient(x[:1], real[:1], fake[:1])
    scaled = real.clone()
    scaled[1] *= 100
    torch.testing.assert_close(dmd_gradient(x, scaled, fake)[:1], alone)


@pytest.mark.parametrize("t_value", [5, 500, 999])
def test_fake_score_loss_with_snr_weight_is_the_mean_squared_error_of_epsilon(t_value):
    x, eps, x0_fake = (torch.randn(2, 4, 4, 4).double() for _ in range(3))
    t = torch.full((2,), t_value)
    alpha, sigma = SCHEDULE.coefficients(t, x)
    x_t = alpha * x + sigma * eps
    eps_fake = (x_t - alpha * x0_fake) / sigma
    expected = (eps_fake - eps).square().flatten(1).mean(1)
    torch.testing.assert_close(fake_score_loss(x0_fake, x, SCHEDULE.snr(t)), expected)


def test_fake_score_loss_sends_no_gradient_to_the_sample():
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    x0_fake = torch.randn(2, 4, 4, 4, requires_grad=True)
    fake_score_loss(x0_fake, x, torch.ones(2)).sum().backward()
    assert x.grad is None and x0_fake.grad is not None


def test_regression_losses():
    x, y = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    torch.testing.assert_close(regression_loss(x, y, "l1"), (x - y).abs().mean((1, 2, 3)))
    torch.testing.assert_close(regression_loss(x, y, "l2"), (x - y).square().mean((1, 2, 3)))
    small = 1e-2 * torch.randn(3, 4, 4, 4)
    torch.testing.assert_close(
        regression_loss(y + small, y, "huber"),
        0.5 * small.square().mean((1, 2, 3)),
        rtol=1e-3,
        atol=0,
    )
    with pytest.raises(ValueError, match="lpips"):
        regression_loss(x, y, "lpips")
