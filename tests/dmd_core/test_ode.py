"""Station 3. Oracles: the exact ODE of a Gaussian, and the family's own diffusers pipeline."""

from itertools import pairwise

import pytest
import torch

from dmd_core.miniature import build_scheduler
from dmd_core.noise import sample_noise
from dmd_core.ode import SOLVERS, integrate, make_scheduler
from dmd_core.schedule import Schedule
from dmd_core.teacher import load_teacher
from tests.dmd_core.gaussian import GaussianDenoiser

STD = 0.6


def _error(solver: str, steps: int, prediction_type: str = "epsilon", **settings) -> float:
    """Mean error against the exact x_end = x_T · √(α² s² + σ²)_end / √(α² s² + σ²)_T."""
    config = {**build_scheduler(prediction_type).config, **settings}
    schedule = Schedule.from_scheduler(build_scheduler(prediction_type))
    teacher = GaussianDenoiser(schedule, 0.0, STD)
    eps = sample_noise(range(8), (4, 8, 8), torch.float64)
    cond = torch.zeros(8, 1, 1)

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
@pytest.mark.parametrize("solver", list(SOLVERS))
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
    ("solver", "guidance_scale"), [("ddim", 1.0), *((solver, 4.0) for solver in SOLVERS)]
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
