"""Every family of noise schedule against diffusers' own schedulers, to float32 precision.

α and σ against `add_noise` and `scale_noise`, what the network is told against `timesteps`, what
it sees against `scale_model_input`, and its output as x₀ against `pred_original_sample`,
`precondition_outputs` and `convert_model_output`.
"""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dmd_core.schedule import Schedule

BETAS = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
    },
}
VP_CASES = [
    (betas, kind)
    for betas in BETAS
    for kind in ("epsilon", "v_prediction", "sample")
    if (betas, kind) != ("zero_snr", "epsilon")
]
T = torch.tensor([0, 1, 20, 399, 700, 979, 998, 999])
# Tolerances are float32's, on values of size 1 that diffusers may divide by a small α.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def _normal(seed: int) -> torch.Tensor:
    return torch.randn(len(T), 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def _each(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


# ---------------------------------------------------------------------- variance-preserving


@pytest.mark.parametrize(("betas", "kind"), VP_CASES)
def test_vp_diffuses_as_ddpm_and_ddim(betas, kind):
    settings = {**BETAS[betas], "prediction_type": kind}
    x0, eps = _normal(0), _normal(1)
    for cls in (DDIMScheduler, DDPMScheduler):
        scheduler = cls(**settings)
        ours = Schedule.from_scheduler(scheduler).diffuse(x0, eps, T)
        torch.testing.assert_close(ours, scheduler.add_noise(x0, eps, T), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("betas", "kind"), VP_CASES)
def test_vp_x0_equals_ddim_s(betas, kind):
    scheduler = DDIMScheduler(**BETAS[betas], prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(1000)
    x_t, output = _normal(2).double(), _normal(3).double()
    schedule = Schedule.from_scheduler(scheduler)
    ours = schedule.x0_from_output(output, x_t, T)
    theirs = [
        scheduler.step(output[i : i + 1], int(t), x_t[i : i + 1]).pred_original_sample
        for i, t in enumerate(T)
    ]
    # x₀ from ε divides by α, 1e-4 at the end of the cosine schedule.
    scale = schedule.coefficients(T, x_t)[0].reciprocal() if kind == "epsilon" else 1.0
    torch.testing.assert_close(ours / scale, torch.cat(theirs) / scale, check_dtype=False, **CLOSE)
    assert torch.equal(schedule.network_time(scheduler.timesteps), scheduler.timesteps)


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_vp_in_sigma_space_tells_and_shows_the_network_the_same(cls, kind):
    """Euler and Heun run on x_t/α_t with σ_t/α_t, and scale the input back to x_t."""
    scheduler = cls(**BETAS["scaled_linear"], prediction_type=kind, timestep_spacing="linspace")
    schedule = Schedule.from_scheduler(scheduler)
    x_t, output = _normal(2), _normal(3)
    for i, t in enumerate(T):
        scheduler.set_timesteps(1000)
        time = scheduler.timesteps[scheduler.timesteps.round() == t][0]
        index = t.view(1)
        alpha, sigma = (float(c) for c in schedule.coefficients(index, x_t[:1]))
        stretched = x_t[i : i + 1] / alpha
        seen = scheduler.scale_model_input(stretched, time)
        torch.testing.assert_close(schedule.network_input(x_t[i : i + 1], index), seen, **CLOSE)
        torch.testing.assert_close(schedule.network_time(index).float(), time.view(1), **CLOSE)
        scheduler_sigma = float(scheduler.sigmas[scheduler.step_index])
        assert scheduler_sigma == pytest.approx(sigma / alpha, rel=1e-5)
        found = scheduler.step(output[i : i + 1], time, stretched).pred_original_sample
        ours = schedule.x0_from_output(output[i : i + 1], x_t[i : i + 1], index)
        torch.testing.assert_close(ours * alpha, found * alpha, **CLOSE)


# ---------------------------------------------------------------------- EDM


@pytest.mark.parametrize("cls", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_edm_equals_the_scheduler_s_own_preconditioning(cls, kind, spacing):
    scheduler = cls(prediction_type=kind, sigma_schedule=spacing, sigma_data=0.6, sigma_max=70.0)
    schedule = Schedule.from_scheduler(scheduler)
    assert schedule.num_timesteps == 1000
    scheduler.set_timesteps(1000)
    sigmas, times = scheduler.sigmas[:-1].flip(0), scheduler.timesteps.flip(0)
    x0, eps, output = _normal(0), _normal(1), _normal(3)
    x_t = scheduler.add_noise(x0, eps, times[T])
    torch.testing.assert_close(schedule.diffuse(x0, eps, T), x_t, rtol=1e-5, atol=1e-5)
    assert schedule.init_noise_sigma == pytest.approx(scheduler.init_noise_sigma)
    torch.testing.assert_close(schedule.network_time(T), times[T], rtol=1e-5, atol=1e-6)
    ours = schedule.x0_from_output(output, x_t, T)
    theirs = scheduler.precondition_outputs(x_t, output, _each(sigmas[T]))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    for i, t in enumerate(T):
        scheduler.set_timesteps(1000)
        seen = scheduler.scale_model_input(x_t[i], times[t])
        ours = schedule.network_input(x_t[i : i + 1], t.view(1))[0]
        torch.testing.assert_close(ours, seen, rtol=1e-5, atol=1e-6)


def test_edm_karras_grid_is_the_schedule_s_own():
    ours, theirs = Schedule.edm(), Schedule.from_scheduler(EDMEulerScheduler())
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=0)
    assert float(ours.sigmas[0]) == pytest.approx(0.002)
    assert float(ours.sigmas[-1]) == pytest.approx(80.0)


def test_a_used_scheduler_is_read_as_a_fresh_one():
    for cls in (EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, EulerDiscreteScheduler):
        used = cls()
        used.set_timesteps(7)
        found, fresh = Schedule.from_scheduler(used), Schedule.from_scheduler(cls())
        assert torch.equal(found.sigmas, fresh.sigmas) and torch.equal(found.alphas, fresh.alphas)


# ---------------------------------------------------------------------- flow matching


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("cls", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_flow_equals_the_training_grid(cls, shift):
    scheduler = cls(shift=shift)
    schedule = Schedule.from_scheduler(scheduler)
    sigmas, times = scheduler.sigmas.flip(0), scheduler.timesteps.flip(0)
    torch.testing.assert_close(schedule.sigmas.float(), sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.network_time(T), times[T], rtol=1e-6, atol=0)
    x0, eps = _normal(0), _normal(1)
    ours = schedule.diffuse(x0, eps, T)
    for i, t in enumerate(T):
        scheduler._step_index = None
        time = times[t].view(1) if cls is FlowMatchEulerDiscreteScheduler else times[t]
        theirs = scheduler.scale_noise(x0[i : i + 1], time, eps[i : i + 1])
        torch.testing.assert_close(ours[i : i + 1], theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(schedule.network_input(ours, T), ours)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_x0_is_one_euler_step_to_sigma_zero(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = Schedule.from_scheduler(scheduler)
    x_t, output = _normal(2), _normal(3)
    ours = schedule.x0_from_output(output, x_t, T)
    for i, t in enumerate(T):
        scheduler.sigmas = torch.tensor([float(schedule.sigmas[t]), 0.0])
        scheduler.timesteps = schedule.network_time(t.view(1))
        scheduler._step_index = None
        step = scheduler.step(output[i], scheduler.timesteps[0], x_t[i])
        torch.testing.assert_close(ours[i], step.prev_sample, **CLOSE)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_flow_with_dynamic_shifting(kind, tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    # As FLUX's pipeline: 0.5 at 256 patches, 1.15 at 4096.
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(1000, mu=mu)
    schedule = Schedule.from_scheduler(scheduler, image_tokens=tokens)
    sigmas, times = scheduler.sigmas[:-1].flip(0), scheduler.timesteps.flip(0)
    torch.testing.assert_close(schedule.sigmas.float(), sigmas, rtol=2e-6, atol=0)
    torch.testing.assert_close(schedule.network_time(T), times[T], rtol=2e-6, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_flow_on_a_vp_solver_s_class(cls, shift):
    scheduler = cls(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    schedule = Schedule.from_scheduler(scheduler)
    # 999 steps lie on the training grid's times 1 … 999 of 1000 (DPM-Solver) or 2 … 1000 (UniPC).
    scheduler.set_timesteps(999)
    first = 0 if cls is DPMSolverMultistepScheduler else 1
    sigmas, times = scheduler.sigmas[:-1].flip(0), scheduler.timesteps.flip(0)
    index = torch.arange(999) + first
    torch.testing.assert_close(schedule.sigmas[index].float(), sigmas, rtol=1e-5, atol=1e-6)
    # Both classes cut the time they tell the network to an integer; ours is the exact one.
    assert (schedule.network_time(index) - times).abs().max() <= 1.001
    x_t, output = _normal(2), _normal(3)
    steps = torch.tensor([0, 1, 500, 998])
    ours = schedule.x0_from_output(output[:4], x_t[:4], 998 + first - steps)
    for i, step in enumerate(steps):
        scheduler._step_index = int(step)
        theirs = scheduler.convert_model_output(output[i], sample=x_t[i])
        torch.testing.assert_close(ours[i], theirs, **CLOSE)


def test_dynamic_shifting_on_a_vp_solver_s_class():
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True
    )
    schedule = Schedule.from_scheduler(scheduler, image_tokens=1024)
    scheduler.set_timesteps(999, mu=0.5 + 0.65 * (1024 - 256) / (4096 - 256))
    sigmas = scheduler.sigmas[:-1].flip(0)
    torch.testing.assert_close(schedule.sigmas[:-1].float(), sigmas, rtol=1e-5, atol=1e-6)
