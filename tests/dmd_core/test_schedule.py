"""Oracles: diffusers' own schedulers, and the round trip of every conversion."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from dmd_core.schedule import Schedule

TYPES = ("epsilon", "v_prediction", "sample")


def _scheduler(prediction_type: str, cls=DDIMScheduler, **settings):
    return cls(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        **settings,
    )


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_x0_equals_the_scheduler_s_own_prediction(prediction_type, t):
    scheduler = _scheduler(prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    x_t, output = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    theirs = scheduler.step(output, t, x_t).pred_original_sample
    ours = Schedule.from_scheduler(scheduler).x0_from_output(output, x_t, torch.tensor([t, t]))
    torch.testing.assert_close(ours, theirs.float(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_conversion_round_trips(prediction_type):
    schedule = Schedule.from_scheduler(_scheduler(prediction_type))
    t = torch.tensor([0, 10, 500, 999])
    x_t, x0 = torch.randn(4, 3, 4, 4).double(), torch.randn(4, 3, 4, 4).double()
    back = schedule.x0_from_output(schedule.output_from_x0(x0, x_t, t).double(), x_t, t)
    torch.testing.assert_close(back, x0.float(), rtol=1e-4, atol=1e-4)


def test_diffuse_equals_add_noise():
    scheduler = _scheduler("epsilon", DPMSolverMultistepScheduler)
    x0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    ours = Schedule.from_scheduler(scheduler).diffuse(x0, eps, t)
    theirs = DDIMScheduler.from_config(scheduler.config).add_noise(x0, eps, t)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_snr_is_alpha_squared_over_sigma_squared():
    schedule = Schedule.from_scheduler(_scheduler("epsilon"))
    t = torch.tensor([0, 999])
    cumulative = _scheduler("epsilon").alphas_cumprod.double()[t]
    torch.testing.assert_close(schedule.snr(t), cumulative / (1 - cumulative))


def test_foreign_schedulers_are_refused():
    with pytest.raises(ValueError, match="variance-preserving"):
        Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="flow_prediction"):
        Schedule.from_scheduler(
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        )


def test_epsilon_with_zero_terminal_snr_is_refused():
    scheduler = _scheduler("epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="zero-terminal-SNR"):
        Schedule.from_scheduler(scheduler)
