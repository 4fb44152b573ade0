"""Station 3 on default grids. Oracles: the exact ODE of a Gaussian, and diffusers' own pipeline.

The order of every solver: test_ode_order.py.
"""

from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from dmd_core.condition import Condition
from dmd_core.miniature import build_scheduler
from dmd_core.noise import sample_noise
from dmd_core.ode import SOLVERS, integrate, make_scheduler, solvers_for
from dmd_core.schedule import Schedule
from dmd_core.teacher import load_teacher
from tests.dmd_core.gaussian import GaussianDenoiser

STD = 0.6
VP_SOLVERS = ["ddim", "pndm", "dpmsolver++", "unipc", "heun", "euler"]


def _error(solver: str, steps: int, prediction_type: str = "epsilon", **settings) -> float:
    """Mean error against the exact x_end = x_T · √(α² s² + σ²)_end / √(α² s² + σ²)_T."""
    config = {**build_scheduler(prediction_type).config, **settings}
    schedule = Schedule.from_scheduler(build_scheduler(prediction_type))
    teacher = GaussianDenoiser(schedule, 0.0, STD)
    eps = sample_noise(range(8), (4, 8, 8), torch.float64)
    cond = Condition()

    def network(x_in, t, c):  # σ-space schedulers have fractional times; these grids have none
        return teacher.network(x_in, t.round().long(), c)

    x_end = integrate(
        network, make_scheduler(solver, config), eps, cond, cond, steps=steps, guidance_scale=1.0
    )

    def std_at(alpha: float, sigma: float) -> float:
        return (alpha**2 * STD**2 + sigma**2) ** 0.5

    stops_at_first_time = settings.get("set_alpha_to_one") is False
    end = std_at(float(schedule.alphas[0]), float(schedule.sigmas[0]))
    exact = (end if stops_at_first_time else STD) / std_at(
        float(schedule.alphas[-1]), float(schedule.sigmas[-1])
    )
    return float((x_end - eps * exact).abs().mean())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("solver", VP_SOLVERS)
def test_error_falls_towards_the_closed_form(solver, prediction_type):
    errors = [_error(solver, steps, prediction_type) for steps in (10, 40, 125)]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.03


def test_ddim_is_first_order():
    # Ended at the first time of the grid: with a last step to σ = 0 no solver shows its order.
    errors = [_error("ddim", steps, set_alpha_to_one=False) for steps in (125, 250, 500)]
    for coarse, fine in pairwise(errors):
        assert 1.7 < coarse / fine < 2.5


@pytest.mark.parametrize(
    ("solver", "guidance_scale"), [("ddim", 1.0), *((solver, 4.0) for solver in VP_SOLVERS)]
)
def test_solve_equals_the_pipeline_s_own_loop(tiny_teacher_dir, solver, guidance_scale):
    teacher = load_teacher(tiny_teacher_dir)
    prompts = ["fox", "red apple", "fox"]
    eps = sample_noise([1, 2, 3], teacher.latent_shape())
    ours = teacher.solve(
        eps, prompts, solver=solver, steps=6, guidance_scale=guidance_scale, negative_prompt="dog"
    )
    pipeline = teacher.pipeline
    own = pipeline.scheduler
    pipeline.register_modules(scheduler=make_scheduler(solver, own.config))
    theirs = pipeline(
        prompts,
        negative_prompt=["dog"] * 3,
        latents=eps,
        num_inference_steps=6,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_stochastic_or_unknown_solvers_are_refused():
    with pytest.raises(ValueError, match="deterministic"):
        make_scheduler("euler_ancestral", build_scheduler().config)


@pytest.mark.parametrize(
    ("teacher", "fitting"),
    [
        (DDIMScheduler(), VP_SOLVERS),
        (FlowMatchEulerDiscreteScheduler(), ["flow_euler"]),
        (
            DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            ["flow_euler"],
        ),
        (EDMEulerScheduler(), ["edm_heun", "edm_euler", "edm_dpmsolver++"]),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_solver_of_another_family_is_refused(teacher, fitting, named):
    """Decided by the class that the configuration names, or by its keys where it names none."""
    config = dict(teacher.config) | ({"_class_name": type(teacher).__name__} if named else {})
    assert solvers_for(config) == fitting
    for solver, (class_name, _) in SOLVERS.items():
        if solver in fitting:
            assert type(make_scheduler(solver, config)).__name__ == class_name
        else:
            with pytest.raises(ValueError, match=f"does not fit .* of {', '.join(fitting[:1])}"):
                make_scheduler(solver, config)


@pytest.mark.parametrize("solver", VP_SOLVERS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.01] * 1000}],
    ids=["defaults", "cosine", "trained"],
)
def test_every_solver_is_on_the_teacher_s_noise_schedule(solver, settings):
    teacher = DDIMScheduler(prediction_type="v_prediction", **settings)
    scheduler = make_scheduler(solver, teacher.config)
    torch.testing.assert_close(scheduler.alphas_cumprod, teacher.alphas_cumprod)
    assert scheduler.config.prediction_type == "v_prediction"


def test_a_schedule_that_a_solver_cannot_take_is_refused():
    zero_snr = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").config
    for solver in ("pndm", "heun"):
        with pytest.raises(ValueError, match="cannot take the teacher's rescale_betas_zero_snr"):
            make_scheduler(solver, zero_snr)
        with pytest.raises(ValueError, match="cannot take the teacher's prediction_type sample"):
            make_scheduler(solver, DDIMScheduler(prediction_type="sample").config)
    assert make_scheduler("ddim", zero_snr).alphas_cumprod[-1] == 0
    with pytest.raises(ValueError, match="without beta_schedule"):
        make_scheduler("ddim", {"_class_name": "ScoreSdeVeScheduler"})
    with pytest.raises(ValueError, match="image_tokens"):
        make_scheduler(
            "flow_euler", FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config
        )


def test_stochastic_and_early_ending_settings_of_the_teacher_are_overruled():
    vp = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", final_sigmas_type="sigma_min"
    ).config
    assert make_scheduler("dpmsolver++", vp).config.algorithm_type == "dpmsolver++"
    flow = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True).config
    assert make_scheduler("flow_euler", flow).config.stochastic_sampling is False
    edm = EDMEulerScheduler(final_sigmas_type="sigma_min").config
    for solver, config in [("dpmsolver++", vp), ("unipc", vp), ("euler", vp), ("edm_euler", edm),
                           ("edm_heun", edm), ("edm_dpmsolver++", edm)]:  # fmt: skip
        scheduler = make_scheduler(solver, config)
        scheduler.set_timesteps(10)
        assert scheduler.sigmas[-1] == 0


def test_flow_shift_reaches_flow_euler_from_either_name():
    other = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for scheduler in (make_scheduler("flow_euler", c.config) for c in (other, own)):
        torch.testing.assert_close(scheduler.sigmas, own.sigmas)
