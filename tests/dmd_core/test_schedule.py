"""Schedules as values: conversions and their inverses, score weights, and what is refused.

Every family against diffusers' own schedulers: test_schedule_families.py.
"""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
    UniPCMultistepScheduler,
)

from dmd_core.schedule import Schedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES = {
    "epsilon": Schedule.from_scheduler(DDIMScheduler(**SD)),
    "v_prediction": Schedule.from_scheduler(DDIMScheduler(**SD, prediction_type="v_prediction")),
    "sample": Schedule.from_scheduler(
        DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    ),
    "flow_prediction": Schedule.flow(shift=3.0),
    "edm": Schedule.edm(sigma_data=0.7),
    "edm_v": Schedule.from_scheduler(EDMEulerScheduler(prediction_type="v_prediction")),
}
ZERO_SNR = Schedule.from_scheduler(
    DDIMScheduler(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True)
)
EVERY_T = torch.arange(1000)


@pytest.fixture(params=list(SCHEDULES))
def schedule(request) -> Schedule:
    return SCHEDULES[request.param]


def _normal(seed: int, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 4, 4, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------------- conversions


def test_every_prediction_type_converts_to_x0_and_back(schedule):
    t = torch.tensor([0, 10, 500, 999])
    x_t, x0, output = _normal(0), _normal(1), _normal(2)
    alpha, sigma = schedule.coefficients(t, x_t)
    # Each direction divides by one of α, σ, c_out, the other multiplies: float32 rounding between.
    back = schedule.x0_from_output(schedule.output_from_x0(x0, x_t, t).double(), x_t, t)
    slack = (1 / alpha if schedule.prediction_type == "epsilon" else 1.0) * (1 + sigma)
    torch.testing.assert_close(back / slack, x0 / slack, check_dtype=False, rtol=1e-5, atol=1e-5)
    again = schedule.output_from_x0(schedule.x0_from_output(output, x_t, t).double(), x_t, t)
    slack = (1 + sigma) / sigma
    torch.testing.assert_close(
        again / slack, output / slack, check_dtype=False, rtol=1e-5, atol=1e-5
    )


def test_conversion_is_in_float64_and_keeps_float32(schedule):
    t = torch.tensor([0, 10, 500, 999])
    x_t, output = _normal(0).bfloat16(), _normal(1).bfloat16()
    found = schedule.x0_from_output(output, x_t, t)
    assert found.dtype == torch.float32
    assert torch.equal(found, schedule.x0_from_output(output.double(), x_t.double(), t))
    assert schedule.diffuse(x_t, output, t).dtype == torch.bfloat16


def test_diffusing_follows_the_family_s_definition():
    x0, eps, t = _normal(0), _normal(1), torch.tensor([0, 10, 500, 999])
    for name, schedule in SCHEDULES.items():
        alpha, sigma = schedule.alphas, schedule.sigmas
        if name == "flow_prediction":
            torch.testing.assert_close(alpha + sigma, torch.ones_like(alpha))
        elif name.startswith("edm"):
            assert bool((alpha == 1).all())
        else:
            torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
        expected = alpha[t].view(4, 1, 1, 1) * x0 + sigma[t].view(4, 1, 1, 1) * eps
        torch.testing.assert_close(schedule.diffuse(x0, eps, t), expected)


def test_renoising_gives_the_marginal_of_the_earlier_time(schedule):
    """Picture and noises enter linearly: each alone gives its factor."""
    one, zero = torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    t, s = torch.tensor([999, 500, 200]), torch.tensor([749, 499, 0])
    alpha_t, sigma_t = schedule.coefficients(t, one)
    alpha_s, sigma_s = schedule.coefficients(s, one)
    picture = schedule.renoise(one, alpha_t * one, zero, t, s)
    old = schedule.renoise(zero, sigma_t * one, zero, t, s)
    new = schedule.renoise(zero, zero, one, t, s)
    torch.testing.assert_close(picture, alpha_s)
    torch.testing.assert_close(old**2 + new**2, sigma_s**2)


@pytest.mark.parametrize("name", ["edm", "edm_v"])
def test_edm_renoises_from_the_posterior_of_the_noisier_picture(name):
    """x_s given x_t and x₀, by conditioning the joint Gaussian: Cov(x_s, x_t) = σ_s²."""
    schedule, x0, x_t, eps = SCHEDULES[name], _normal(0, 3), 9 * _normal(1, 3), _normal(2, 3)
    t, s = torch.tensor([999, 500, 200]), torch.tensor([749, 499, 0])
    _, sigma_t = schedule.coefficients(t, x0)
    _, sigma_s = schedule.coefficients(s, x0)
    mean = x0 + sigma_s**2 / sigma_t**2 * (x_t - x0)
    variance = sigma_s**2 - sigma_s**4 / sigma_t**2
    found = schedule.renoise(x0, x_t, eps, t, s)
    torch.testing.assert_close(found, mean + variance.sqrt() * eps)


# ---------------------------------------------------------------------- α, σ, log-SNR, inverses


def test_log_snr_falls_from_clean_to_noise(schedule):
    alpha, sigma = schedule.alphas, schedule.sigmas
    torch.testing.assert_close(schedule.snr(EVERY_T), alpha**2 / sigma**2)
    torch.testing.assert_close(schedule.log_snr(EVERY_T), 2 * (alpha.log() - sigma.log()))
    assert bool((schedule.log_snr(EVERY_T).diff() < 0).all())


@pytest.mark.parametrize("name", ["alpha", "sigma", "log_snr"])
def test_inverses_round_trip_on_the_grid_and_lie_between_neighbours_off_it(schedule, name):
    if name == "alpha" and schedule.prediction_type.startswith("edm"):
        with pytest.raises(ValueError, match="no inverse"):
            schedule.time_of_alpha(torch.tensor([1.0]))
        return
    values = {
        "alpha": schedule.alphas, "sigma": schedule.sigmas, "log_snr": schedule.log_snr(EVERY_T)
    }[name]  # fmt: skip
    inverse = getattr(schedule, f"time_of_{name}")
    torch.testing.assert_close(inverse(values), EVERY_T.double(), rtol=0, atol=1e-9)
    finite = values[values.isfinite()]
    between = inverse(finite[:-1] + 0.25 * finite.diff())
    expected = EVERY_T[: len(between)] + 0.25
    torch.testing.assert_close(between, expected.double(), rtol=0, atol=1e-6)
    # Beyond the ends: the ends.
    span = finite[-1] - finite[0]
    assert inverse(finite[:1] - span).item() == 0.0
    if len(finite) == len(values):
        assert inverse(finite[-1:] + span).item() == 999.0


def test_zero_terminal_snr_has_a_log_snr_and_an_inverse():
    assert ZERO_SNR.log_snr(torch.tensor([999])).item() == -torch.inf
    grid = ZERO_SNR.time_of_log_snr(ZERO_SNR.log_snr(EVERY_T))
    torch.testing.assert_close(grid, EVERY_T.double(), rtol=0, atol=1e-9)
    below = ZERO_SNR.log_snr(torch.tensor([998])) - 5.0
    assert 998.0 <= ZERO_SNR.time_of_log_snr(below).item() <= 999.0


# ---------------------------------------------------------------------- score weights


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_score_weight_is_the_error_in_which_the_teacher_was_trained(name):
    """Each from its definition: what the network should say for the true x₀ against what it says
    for its own x̂₀, or EDM's λ(σ)‖D − x‖²."""
    schedule = SCHEDULES[name]
    t = torch.tensor([3, 100, 500, 950])
    x0, eps, x0_hat = _normal(0), _normal(1), _normal(2)
    x_t = schedule.diffuse(x0, eps, t)
    alpha, sigma = schedule.coefficients(t, x_t)
    if name == "epsilon":
        error = (x_t - alpha * x0_hat) / sigma - eps
    elif name == "v_prediction":  # v = α ε − σ x₀, with the ε that belongs to x̂₀
        eps_hat = (x_t - alpha * x0_hat) / sigma
        error = (alpha * eps_hat - sigma * x0_hat) - (alpha * eps - sigma * x0)
    elif name == "sample":
        error = x0_hat - x0
    elif name == "flow_prediction":  # v = ε − x₀ = (x_t − x₀)/σ
        error = (x_t - x0_hat) / sigma - (eps - x0)
    else:  # EDM Table 1: λ(σ) = (σ² + σ_d²)/(σ σ_d)²
        weight = (sigma**2 + schedule.sigma_data**2) / (sigma * schedule.sigma_data) ** 2
        error = weight.sqrt() * (x0_hat - x0)
    ours = schedule.score_weight(t) * (x0_hat - x0).square().mean((1, 2, 3))
    torch.testing.assert_close(ours, error.square().mean((1, 2, 3)), rtol=1e-9, atol=0)


def test_score_weight_by_name():
    schedule, t = SCHEDULES["v_prediction"], torch.tensor([0, 500, 999])
    alpha, sigma = schedule.alphas[t], schedule.sigmas[t]
    for kind, expected in {
        "epsilon": alpha**2 / sigma**2, "v": 1 / sigma**2, "x0": torch.ones(3).double(),
        "edm": alpha**2 / sigma**2 + 4.0, "teacher": 1 / sigma**2,
    }.items():  # fmt: skip
        torch.testing.assert_close(schedule.score_weight(t, kind), expected)
    with pytest.raises(ValueError, match="'snr'; expected one of teacher, epsilon, v, x0, edm"):
        schedule.score_weight(t, "snr")


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_epsilon_with_zero_terminal_snr_is_refused(cls):
    scheduler = cls(**SD, rescale_betas_zero_snr=True)
    # DDIM's ᾱ_T is zero, Euler and UniPC put 2^-24 there.
    assert float(scheduler.alphas_cumprod[-1]) == (0.0 if cls is DDIMScheduler else 2**-24)
    with pytest.raises(ValueError, match="zero-terminal-SNR"):
        Schedule.from_scheduler(scheduler)
    with pytest.raises(ValueError, match="zero-terminal-SNR"):
        Schedule.vp(torch.tensor([0.9, 0.5, 0.0]), "epsilon")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(prediction_type="noise"), "'noise'; expected one of epsilon, v_prediction"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "'flow_prediction'"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "expected one of flow_prediction"),
        (EDMDPMSolverMultistepScheduler(prediction_type="sample"), "'sample'; expected one of"),
        (ScoreSdeVeScheduler(), "no alphas_cumprod"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "image_tokens"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction",
                                sigma_min=0.002, sigma_max=700.0), "timestep_type"),
    ],
)  # fmt: skip
def test_a_scheduler_that_would_be_read_wrongly_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_scheduler(scheduler)


# ---------------------------------------------------------------------- devices


def test_nothing_is_looked_up_on_another_device_than_that_of_the_times(schedule):
    """Tensors of the meta device cannot be copied: who tried it would get an error, as a GPU would
    be waited for."""
    t, x_t = torch.tensor([0, 500, 999], device="meta"), torch.empty(3, 3, 4, 4, device="meta")
    found = [
        *schedule.coefficients(t, x_t), schedule.snr(t), schedule.log_snr(t),
        *(schedule.score_weight(t, kind) for kind in ("teacher", "epsilon", "v", "x0", "edm")),
        schedule.diffuse(x_t, x_t, t), schedule.network_time(t), schedule.network_input(x_t, t),
        schedule.x0_from_output(x_t, x_t, t), schedule.output_from_x0(x_t, x_t, t),
    ]  # fmt: skip
    assert {tensor.device.type for tensor in found} == {"meta"}


def test_a_table_is_copied_to_a_device_once(schedule):
    t, x_t = torch.tensor([7], device="meta"), torch.empty(1, 3, 4, 4, device="meta")
    schedule.coefficients(t, x_t)
    assert schedule._on(t.device) is schedule._on(x_t.device)
    assert schedule._on(torch.device("cpu")).alphas is schedule.alphas
