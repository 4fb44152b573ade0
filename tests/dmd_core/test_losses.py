"""Station 6. Oracle: the closed form of Gaussians, with sign and size.

Student N(m, s²) against teacher N(0, s²): x̂_fake − x̂_real = (1 − k) m at every x_t.
"""

import pytest
import torch
from diffusers import DDIMScheduler
from torch.nn.functional import binary_cross_entropy_with_logits

from dmd_core.condition import Condition
from dmd_core.losses import (
    distribution_matching_loss,
    dmd_gradient,
    fake_score_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    r1_penalty,
    regression_distance,
)
from dmd_core.schedule import Schedule
from tests.dmd_core.gaussian import GaussianDenoiser

SCHEDULE = Schedule.from_scheduler(
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
)
FAMILIES = {
    "vp": SCHEDULE,
    "edm": Schedule.edm(),
    "flow": Schedule.flow(),
    "shifted flow": Schedule.flow(shift=3.0),
}
COND = Condition()


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


def _gaussian_score(x_t: torch.Tensor, alpha, sigma, mean: float, std: float) -> torch.Tensor:
    """∇ log N(x_t; α m, α² s² + σ²)."""
    return -(x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("weighting", ["normalised", "sigma_over_alpha", "sigma3_over_alpha"])
@pytest.mark.parametrize("t_value", [20, 500, 979])
def test_every_weighting_is_its_weight_times_the_score_difference(family, weighting, t_value):
    """w_t α_t (s_fake − s_real) of DMD Eq. 7 from the exact scores of two Gaussians, in float64.

    "normalised" without α_t, as in the paper's Algorithm 2: w_t (s_fake − s_real)."""
    schedule, t = FAMILIES[family], torch.full((6,), t_value)
    (m_real, s_real), (m_fake, s_fake) = (-0.2, 0.5), (0.7, 0.8)
    x = m_fake + s_fake * torch.randn(6, 4, 8, 8, dtype=torch.float64)
    x_t = schedule.diffuse(x, torch.randn_like(x), t)
    alpha, sigma = schedule.coefficients(t, x)
    score_real = _gaussian_score(x_t, alpha, sigma, m_real, s_real)
    score_fake = _gaussian_score(x_t, alpha, sigma, m_fake, s_fake)
    if weighting == "normalised":  # Eq. 8, with x̂_real by Tweedie's formula
        x0_real = (x_t + sigma**2 * score_real) / alpha
        per_sample = [(x0_real[row] - x[row]).abs().mean() for row in range(6)]
        w = sigma**2 / alpha / torch.stack(per_sample).view(6, 1, 1, 1)
        expected = w * (score_fake - score_real)
    else:
        w = sigma / alpha if weighting == "sigma_over_alpha" else sigma**3 / alpha
        expected = w * alpha * (score_fake - score_real)
    gradient = dmd_gradient(
        x, GaussianDenoiser(schedule, m_real, s_real)(x_t, t, COND),
        GaussianDenoiser(schedule, m_fake, s_fake)(x_t, t, COND),
        weighting=weighting, alpha_t=alpha, sigma_t=sigma,
    )  # fmt: skip
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("weighting", ["sigma_over_alpha", "sigma3_over_alpha", "softplus"])
def test_weightings_name_what_they_lack(weighting):
    x = torch.randn(2, 4, 4, 4)
    with pytest.raises(ValueError, match="needs alpha_t and sigma_t"):
        dmd_gradient(x, x, x, weighting=weighting)
    if weighting == "softplus":
        with pytest.raises(ValueError, match="'softplus'; expected one of normalised"):
            dmd_gradient(x, x, x, weighting=weighting, alpha_t=x, sigma_t=x)


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
    torch.testing.assert_close(regression_distance("l1")(x, y), (x - y).abs().mean((1, 2, 3)))
    torch.testing.assert_close(regression_distance("l2")(x, y), (x - y).square().mean((1, 2, 3)))
    small = 1e-2 * torch.randn(3, 4, 4, 4)
    torch.testing.assert_close(
        regression_distance("huber")(y + small, y),
        0.5 * small.square().mean((1, 2, 3)),
        rtol=1e-3,
        atol=0,
    )
    with pytest.raises(ValueError, match="lpips"):
        regression_distance("lpips")


# ---------------------------------------------------------------------- DMD2's discriminator


def test_gan_losses_are_binary_cross_entropy():
    fake, real = 5 * torch.randn(64).double(), 5 * torch.randn(64).double()
    ones, zeros = torch.ones_like(fake), torch.zeros_like(fake)

    def entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return binary_cross_entropy_with_logits(logits, labels, reduction="none")

    torch.testing.assert_close(gan_generator_loss(fake), entropy(fake, ones))
    torch.testing.assert_close(
        gan_discriminator_loss(fake, real), entropy(fake, zeros) + entropy(real, ones)
    )


@pytest.mark.parametrize("sigma", [0.01, 0.1])
@pytest.mark.parametrize("curvature", [0.0, 1.0], ids=["linear", "quadratic"])
def test_mean_r1_penalty_tends_to_the_squared_gradient(curvature, sigma):
    generator = torch.Generator().manual_seed(0)
    x, slope = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(2))
    bend = curvature * torch.randn(4, 4, generator=generator, dtype=torch.float64)
    bend = bend + bend.T

    def logit(points: torch.Tensor) -> torch.Tensor:
        return points @ slope + 0.5 * ((points @ bend) * points).sum(dim=-1)

    count = 400_000
    near = x + sigma * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    penalty = r1_penalty(logit(x).expand(count), logit(near), sigma)
    assert penalty.shape == (count,)
    squared_gradient = (slope + bend @ x).square().sum()
    # The next term of the expansion: E[(½ σ nᵀHn)²] = σ²/4 (tr² H + 2 tr H²).
    remainder = sigma**2 / 4 * (bend.trace() ** 2 + 2 * (bend @ bend).trace())
    torch.testing.assert_close(penalty.mean(), squared_gradient + remainder, rtol=0.01, atol=0)
