"""Station 3: the teacher's probability-flow ODE, integrated by diffusers' own schedulers.

Only deterministic solvers are allowed: a stochastic one defines no noise→picture function, and
then a stored pair means nothing.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import diffusers
import numpy as np
import torch

from dmd_core.condition import Condition
from dmd_core.denoiser import RawNetwork
from dmd_core.diffusers_schedules import family, flow_mu, flow_shift
from dmd_core.edm_heun import EDMHeunScheduler

# name → (class of diffusers or ours, settings that make it a deterministic ODE solver down to x₀)
SOLVERS: dict[str, tuple[str, dict]] = {
    # Clipping x₀ to [−1, 1], this class's default, would be wrong: latents are not pictures, and on
    # pixels it would no longer be the ODE whose marginals are the teacher's.
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpmsolver++": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"},
    ),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "zero"}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {"final_sigmas_type": "zero"}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": False}),
    "edm_heun": ("EDMHeunScheduler", {"final_sigmas_type": "zero"}),
    "edm_euler": ("EDMEulerScheduler", {"final_sigmas_type": "zero"}),
    "edm_dpmsolver++": (
        "EDMDPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"},
    ),
}

# A variance-preserving teacher's α_t, σ_t and meaning of the output. Passed on by name, because
# `from_config` drops what was a default, and the classes differ in theirs (Heun's β).
_NOISE_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "snr_shift_scale",
    "prediction_type",
)
_WITHOUT_X0_PREDICTION = ("pndm", "heun")


class SolverError(ValueError):
    """A solver that is not known, or that cannot take the teacher's noise schedule."""


def solvers_for(config: Mapping[str, Any]) -> list[str]:
    """The solvers that fit the family of a teacher whose scheduler has `config`."""
    wanted = family(config.get("_class_name", ""), config)
    return [name for name, (class_name, _) in SOLVERS.items() if family(class_name, {}) == wanted]


def make_scheduler(solver: str, config: Mapping[str, Any], image_tokens: int | None = None):
    """A fresh diffusers scheduler for `solver`, on the noise schedule of the teacher's `config`.

    `image_tokens`: latent patches of a picture, for schedules that depend on its size. Raises
    `SolverError`.
    """
    if solver not in SOLVERS:
        raise SolverError(
            f"solver {solver!r} is not one of the deterministic solvers {', '.join(SOLVERS)}"
        )
    fitting = solvers_for(config)
    if solver not in fitting:
        raise SolverError(
            f"solver {solver!r} does not fit the teacher's noise schedule "
            f"({config.get('_class_name', 'no _class_name')}); expected one of {', '.join(fitting)}"
        )
    class_name, settings = SOLVERS[solver]
    cls = _class(class_name)
    kind = family(class_name, {})
    if kind == "vp":
        settings = {**_noise_settings(solver, cls, config), **settings}
    elif kind == "flow":
        # A dynamic shift is told with the steps (`step_grid`); the size must be known for that.
        shift = flow_shift(config, image_tokens)
        dynamic = config.get("use_dynamic_shifting", False)
        settings = ({} if dynamic else {"shift": shift}) | settings
    return cls.from_config(dict(config), **settings)


def _class(name: str) -> Any:
    return EDMHeunScheduler if name == EDMHeunScheduler.__name__ else getattr(diffusers, name)


def step_grid(
    config: Mapping[str, Any], steps: int, image_tokens: int | None, *, by_sigmas: bool = False
) -> dict[str, Any]:
    """What a pipeline tells a scheduler of `config` in `set_timesteps`: the number of steps, or,
    `by_sigmas` (FLUX), σ itself; and μ where the shift depends on the picture's size."""
    grid: dict[str, Any] = {"num_inference_steps": steps}
    if by_sigmas and not config.get("use_flow_sigmas", False):
        grid = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    if config.get("use_dynamic_shifting", False):
        grid["mu"] = flow_mu(config, image_tokens)
    return grid


def noise_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a scheduler's `config` makes a variance-preserving noise schedule."""
    return {
        name: config[name]
        for name in _NOISE_SETTINGS
        if config.get(name) is not None and name in signature(diffusers.DDIMScheduler).parameters
    }


def _noise_settings(solver: str, cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's noise schedule as arguments of `cls`, which must be able to take all of it."""
    accepted = signature(cls).parameters
    given = {name: config[name] for name in _NOISE_SETTINGS if config.get(name) is not None}
    lost = [name for name, value in given.items() if name not in accepted and value is not False]
    if "beta_schedule" not in given:
        lost.append("a noise schedule without beta_schedule")
    if solver in _WITHOUT_X0_PREDICTION and given.get("prediction_type") == "sample":
        lost.append("prediction_type sample")
    if lost:
        raise SolverError(f"solver {solver!r} cannot take the teacher's {', '.join(lost)}")
    return {name: value for name, value in given.items() if name in accepted}


@torch.no_grad()
def integrate(
    network: RawNetwork,
    scheduler,
    eps: torch.Tensor,
    cond: Condition,
    uncond: Condition,
    *,
    steps: int,
    guidance_scale: float,
    grid: Mapping[str, Any] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """x₀ of the guided ODE started at ε: (B,C,H,W) → (B,C,H,W), in the dtype of `eps`.

    `uncond` has one row. Matches the `__call__` of the teacher's pipeline on the same latents
    step for step; guidance is the standard scale, and 1.0 or less means none, as in diffusers; a
    guidance-distilled network is told the scale. `grid`: see `step_grid`; None: `steps` alone.
    """
    scheduler.set_timesteps(**(grid or {"num_inference_steps": steps}), device=eps.device)
    # Flow-matching schedulers start at ε itself and scale nothing, so they lack these two.
    x_t = eps * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    distilled = cond.guidance is not None
    cond = cond.with_guidance(guidance_scale) if distilled else cond
    guided = guidance_scale > 1.0 and not distilled
    both = Condition.cat(uncond.expand(len(eps)), cond) if guided else cond
    for index, t in enumerate(scheduler.timesteps):
        x_in = scale(torch.cat([x_t, x_t]) if guided else x_t, t)
        output = network(x_in, t.expand(len(x_in)), both)
        if guided:
            output_uncond, output_cond = output.chunk(2)
            output = output_uncond + guidance_scale * (output_cond - output_uncond)
        x_t = scheduler.step(output, t, x_t, return_dict=False)[0]
        if on_step is not None:
            on_step(index)
    return x_t
