"""Station 3. Oracle: the exact ODE of N(0, s²), and the order at which each solver reaches it.

x_t of the ODE is proportional to the standard deviation at t, √(α² s² + σ²). A solver shows its
order on a grid of equal steps in log-SNR that ends at the cleanest time t_min. Every
variance-preserving scheduler of diffusers lays grids of equal steps in t, so the teacher here has
a schedule whose log-SNR is linear in t (through `trained_betas`). diffusers' own grids in log-SNR
do not serve: `use_lu_lambdas` and `use_exponential_sigmas` give times between two integers, which
DPM-Solver++ and UniPC cut to integers before they reach the network, and which DDIM and PNDM do
not offer. What ends each of them at t_min, in the other solvers' place of the step to σ = 0:

- DDIM, PNDM: `set_alpha_to_one=False`; equal steps only with the spacing "leading";
- DPM-Solver++, UniPC, Euler: `final_sigmas_type="sigma_min"`. UniPC's last step is of first order
  unless `lower_order_final=False`; DPM-Solver++ lowers it for less than 15 steps only;
- Heun has no such setting. Its last step is always Euler's to σ = 0, which returns the exact
  denoiser's x₀ at t_min: that is the closed form for it here, and for EDM's two solvers, whose
  own "exponential" grid is equally spaced in log-SNR.

PNDM is a fourth-order rule in t; its transfer (PNDM Eq. 9) weighs the step by σ/α, and so the
whole is of second order. UniPC-2 with its corrector is of third (its predictor alone:
of second).
"""

from itertools import pairwise
from math import log2

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from dmd_core.condition import Condition
from dmd_core.noise import sample_noise
from dmd_core.ode import integrate, make_scheduler
from dmd_core.schedule import Schedule
from tests.dmd_core.gaussian import GaussianDenoiser

STD = 0.6
COUNT = 961  # times: 960 equal steps, divided by 15, 30, 60, 120


def _linear_log_snr_betas() -> list[float]:
    """β with σ/α from 0.05 to 20, equally spaced in its logarithm."""
    ratio = torch.linspace(-3.0, 3.0, COUNT, dtype=torch.float64).exp()
    kept = 1 / (1 + ratio**2)  # ᾱ
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    return (1 - kept / before).tolist()


TEACHER = DDIMScheduler(num_train_timesteps=COUNT, trained_betas=_linear_log_snr_betas())
SCHEDULE = Schedule.from_scheduler(TEACHER)
# solver → (settings of its grid and end, order)
VP = {
    "ddim": ({"set_alpha_to_one": False, "timestep_spacing": "leading"}, 1),
    "pndm": ({"set_alpha_to_one": False, "timestep_spacing": "leading"}, 2),
    "dpmsolver++": ({"final_sigmas_type": "sigma_min", "timestep_spacing": "linspace"}, 2),
    "unipc": (
        {
            "final_sigmas_type": "sigma_min",
            "timestep_spacing": "linspace",
            "lower_order_final": False,
        },
        3,
    ),
    "heun": ({"timestep_spacing": "leading"}, 2),
    "euler": ({"final_sigmas_type": "sigma_min", "timestep_spacing": "leading"}, 1),
}


def _std(alpha: float, sigma: float) -> float:
    return (alpha**2 * STD**2 + sigma**2) ** 0.5


def _solve(network, scheduler, steps: int) -> float:
    """x_end/ε, one number for all pixels: the ODE is linear."""
    eps = sample_noise(range(2), (1, 2, 2), torch.float64)
    cond = Condition()
    x_end = integrate(network, scheduler, eps, cond, cond, steps=steps, guidance_scale=1.0)
    ratio = x_end.double() / eps
    torch.testing.assert_close(
        ratio, torch.full_like(ratio, float(ratio.mean())), rtol=1e-4, atol=0
    )
    return float(ratio.mean())


def _vp_error(solver: str, steps: int, **settings) -> float:
    scheduler = make_scheduler(solver, TEACHER.config)
    scheduler = type(scheduler).from_config(scheduler.config, **settings)
    teacher = GaussianDenoiser(SCHEDULE, 0.0, STD)
    times: list[int] = []

    def network(x_in, t, cond):
        times.append(int(t[0]))
        return teacher.network(x_in, t.round().long(), cond)

    found = _solve(network, scheduler, steps)
    alphas, sigmas = (c.tolist() for c in (SCHEDULE.alphas, SCHEDULE.sigmas))
    exact = _std(alphas[0], sigmas[0]) / _std(alphas[times[0]], sigmas[times[0]])
    if solver == "heun":  # ends in x₀ of the exact denoiser
        exact *= alphas[0] * STD**2 / _std(alphas[0], sigmas[0]) ** 2
    elif solver == "euler":  # runs on x_t/α_t
        exact /= alphas[0]
    assert times[0] > 0.9 * COUNT and times[-1] <= COUNT // steps + 1
    return abs(found - exact)


def _orders(errors: list[float]) -> list[float]:
    return [log2(coarse / fine) for coarse, fine in pairwise(errors)]


@pytest.mark.parametrize("solver", list(VP))
def test_order_on_a_log_snr_grid(solver):
    settings, order = VP[solver]
    errors = [_vp_error(solver, steps, **settings) for steps in (30, 60, 120)]
    assert _orders(errors) == pytest.approx([order, order], abs=0.1)
    assert errors[-1] < 10.0 ** -(order + 1)


def _flow_error(shift: float, steps: int) -> float:
    """v = E[ε − x₀ | x_t] of N(0, s²), told t = 1000 σ only; from σ = 1 to 0 exactly x₀ = s ε."""

    def network(x, t, cond):
        sigma = t.double().view(-1, 1, 1, 1) / 1000
        variance = (1 - sigma) ** 2 * STD**2 + sigma**2
        return (sigma - (1 - sigma) * STD**2) / variance * x

    config = FlowMatchEulerDiscreteScheduler(shift=shift).config
    return abs(_solve(network, make_scheduler("flow_euler", config), steps) - STD)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_is_first_order_on_its_own_grid(shift):
    """The flow's velocity is smooth down to σ = 0, so no other grid is needed."""
    errors = [_flow_error(shift, steps) for steps in (20, 40, 80)]
    assert _orders(errors) == pytest.approx([1, 1], abs=0.1)
    assert errors[-1] < 0.02


def _edm_error(solver: str, steps: int, **settings) -> float:
    """A network that is told log σ / 4 and c_in x only, and says EDM's F of the exact denoiser."""
    scheduler = make_scheduler(solver, EDMEulerScheduler(**settings).config)
    config, data = scheduler.config, 0.5

    def network(x_in, t, cond):
        sigma = (4 * t.double().view(-1, 1, 1, 1)).exp()
        total = sigma**2 + data**2
        x = x_in * total.sqrt()
        x0 = STD**2 / (STD**2 + sigma**2) * x
        output = (x0 - data**2 / total * x) / (sigma * data / total.sqrt())
        return output if config.prediction_type == "epsilon" else -output

    found = _solve(network, scheduler, steps)
    x_start = (config.sigma_max**2 + 1) ** 0.5
    x_min = x_start * _std(1.0, config.sigma_min) / _std(1.0, config.sigma_max)
    return abs(found - x_min * (STD / _std(1.0, config.sigma_min)) ** 2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("solver", "order"), [("edm_euler", 1), ("edm_heun", 2), ("edm_dpmsolver++", 2)]
)
def test_edm_order_on_a_log_snr_grid(solver, order, kind):
    settings = {"sigma_schedule": "exponential", "sigma_min": 0.02, "sigma_max": 20.0}
    # Heun's own order shows later: from 20 to 40 steps the error falls by 2^2.15.
    grids = (40, 80, 160) if solver == "edm_heun" else (20, 40, 80)
    errors = [_edm_error(solver, steps, prediction_type=kind, **settings) for steps in grids]
    assert _orders(errors) == pytest.approx([order, order], abs=0.1)
    assert errors[-1] < 0.02 if order == 1 else errors[-1] < 0.0005


@pytest.mark.parametrize("solver", ["edm_euler", "edm_heun", "edm_dpmsolver++"])
def test_edm_error_falls_on_the_default_grid(solver):
    """Karras' σ from 80 to 0.002: x₀ = x_T s/√(s² + σ²)."""
    errors = [_edm_error(solver, steps) for steps in (10, 40, 160)]
    assert errors[1] < 0.35 * errors[0] and errors[2] < 0.35 * errors[1]
    assert errors[2] < 0.02
