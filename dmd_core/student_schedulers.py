"""Schedulers whose default times are a student's, so that its user needs to pass none.

A one-step student's scheduler returns x̂₀ itself; a few-step student's predicts x̂₀ and puts fresh
noise on it down to the next time, as `Schedule.renoise` says.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from diffusers import (
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
)

from dmd_core.diffusers_schedules import edm_sigmas, family, flow_shift
from dmd_core.ode import noise_settings, step_grid
from dmd_core.schedule import Schedule

Times = tuple[int, ...]
# What of a flow scheduler bends its steps for a solver; a student's times are its own.
_STRAIGHT = {
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
    "invert_sigmas": False,
}


def student_scheduler(
    teacher_config: Mapping[str, Any],
    timesteps: Times,
    *,
    image_tokens: int | None = None,
    by_sigmas: bool = False,
) -> Any:
    """A scheduler whose default timesteps, for len(`timesteps`) steps, are exactly `timesteps`.

    Raises ValueError when no scheduler's defaults are these; then the student would need its user
    to pass them by hand. `teacher_config` is the configuration of the teacher's scheduler;
    `image_tokens` and `by_sigmas` as `step_grid` takes them.
    """
    config, kind = (
        dict(teacher_config),
        family(teacher_config.get("_class_name", ""), teacher_config),
    )
    if kind == "vp":
        return _checked_vp(config, timesteps)
    if kind == "edm":
        return _checked_edm(config, timesteps)
    return _checked_flow(config, timesteps, image_tokens, by_sigmas)


def _compare(found: Times, wanted: Times, even: list[int]) -> None:
    if found != wanted:
        raise ValueError(
            f"no diffusers scheduler has the timesteps {list(wanted)} as its default (nearest: "
            f"{list(found)}); expected evenly spaced times such as {even}"
        )


# ------------------------------------------------------------------ variance-preserving


def _checked_vp(config: dict, timesteps: Times) -> Any:
    one = len(timesteps) == 1
    scheduler = _one_step(config, timesteps[0]) if one else _few_steps(config, timesteps)
    scheduler.set_timesteps(len(timesteps))
    found = tuple(scheduler.timesteps.tolist())
    total, steps = config["num_train_timesteps"], len(timesteps)
    _compare(found, timesteps, [total - 1 - total * k // steps for k in range(steps)])
    return scheduler


def _one_step(config: dict, timestep: int) -> DDIMScheduler:
    """One step at `timestep` that returns x̂₀ itself.

    "trailing" spacing puts one step at the last time, and DDIM's last step, with ᾱ = 1 after it,
    returns the predicted x₀ without re-noising. For an earlier time the schedule is cut off there.
    """
    settings: dict = {
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
    }
    if timestep != config["num_train_timesteps"] - 1:
        whole = DDIMScheduler.from_config(dict(config), **noise_settings(config))
        betas = whole.betas[: timestep + 1]
        settings |= {
            "trained_betas": [float(beta) for beta in betas],
            "num_train_timesteps": timestep + 1,
            "rescale_betas_zero_snr": False,  # those betas are rescaled already
        }
    scheduler = DDIMScheduler.from_config(dict(config), **(noise_settings(config) | settings))
    assert isinstance(scheduler, DDIMScheduler)
    return scheduler


def _few_steps(config: dict, timesteps: Times) -> LCMScheduler:
    """x̂₀, then fresh noise to the next time: what DMD2's student does, and LCM's scheduler too.

    Its default grid of 50 times gives 999, 759, 499, 259; one of all times 999, 749, 499, 249.
    """
    total = config["num_train_timesteps"]
    grids = [n for n in range(total, 0, -1) if total % n == 0 and n >= len(timesteps)]
    for grid in grids:
        scheduler = LCMScheduler.from_config(
            dict(config),
            **noise_settings(config),
            original_inference_steps=grid,
            clip_sample=False,
            thresholding=False,
        )
        assert isinstance(scheduler, LCMScheduler)
        scheduler.set_timesteps(len(timesteps))
        if tuple(scheduler.timesteps.tolist()) == timesteps:
            return scheduler
    return LCMScheduler.from_config(dict(config), original_inference_steps=total)  # type: ignore


# ------------------------------------------------------------------ EDM


def _checked_edm(config: dict, timesteps: Times) -> Any:
    total, steps = config["num_train_timesteps"], len(timesteps)
    gap = round((timesteps[0] - timesteps[-1]) / max(steps - 1, 1))
    _compare(_falling(total, gap, steps), timesteps, list(_falling(total, total // steps, steps)))
    return _edm(config, timesteps)


def _falling(total: int, gap: int, steps: int) -> Times:
    return tuple(total - 1 - gap * k for k in range(steps))


def _edm(config: dict, timesteps: Times) -> Any:
    """Euler's one step from σ_max to 0 is x̂₀. For several, the stochastic first-order step of
    DPM-Solver++ on a grid that ends at the student's last σ: even in what the teacher's times
    are even in, σ^(1/ρ) or log σ."""
    euler = _known(EDMEulerScheduler, config)
    if len(timesteps) == 1:
        # One step of the exponential schedule would be at σ_min.
        one: dict[str, Any] = {"final_sigmas_type": "zero", "sigma_schedule": "karras"}
        return EDMEulerScheduler(**(euler | one))
    grid = edm_sigmas(EDMEulerScheduler(**euler))
    several: dict[str, Any] = {
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 1,
        "final_sigmas_type": "zero",
        "sigma_min": float(grid[timesteps[-1]]),
        "thresholding": False,
    }
    known = _known(EDMDPMSolverMultistepScheduler, config)
    return EDMDPMSolverMultistepScheduler(**(known | several))


# ------------------------------------------------------------------ flow


def _checked_flow(config: dict, timesteps: Times, image_tokens: int | None, by_sigmas: bool) -> Any:
    scheduler, steps = _flow(config, timesteps, image_tokens, by_sigmas), len(timesteps)
    scheduler.set_timesteps(**step_grid(scheduler.config, steps, image_tokens, by_sigmas=by_sigmas))
    grid = Schedule.flow(config["num_train_timesteps"], flow_shift(config, image_tokens)).sigmas
    nearest = (grid - scheduler.sigmas[:-1, None].double()).abs().argmin(1)
    even = [round(len(grid) * (steps - k) / steps) - 1 for k in range(steps)]
    _compare(tuple(nearest.tolist()), timesteps, even)
    return scheduler


def _flow(config: dict, timesteps: Times, image_tokens: int | None, by_sigmas: bool) -> Any:
    """Euler's one step from σ = 1 to 0 is x̂₀; for several, LCM's scheduler of flow models."""
    dynamic = config.get("use_dynamic_shifting", False)
    if len(timesteps) == 1 or by_sigmas:
        cls = FlowMatchEulerDiscreteScheduler if len(timesteps) == 1 else FlowMatchLCMScheduler
        shift: dict[str, Any] = {} if dynamic else {"shift": flow_shift(config, image_tokens)}
        return cls(**(_known(cls, config | _STRAIGHT) | shift))
    return _evenly_spaced(config, len(timesteps), flow_shift(config, image_tokens))


def _evenly_spaced(config: dict, steps: int, shift: float) -> Any:
    """Default steps at σ' = s σ / (1 + (s − 1) σ) for σ = 1, 1 − 1/n, …, 1/n, with s = `shift`.

    A pipeline that passes no σ gets a grid that runs down to the scheduler's smallest one. Another
    shift s', and a `shift_terminal` (which scales 1 − σ' so that the last is as told), bring that
    grid to the wanted one: a = n (1 − σ_min)/(n − 1) and s' = a s / (1 + s (a − 1)).
    """
    total = config["num_train_timesteps"]
    ours = shift
    for _ in range(50):  # σ_min is itself shifted by s'
        smallest = ours / total / (1 + (ours - 1) / total)
        a = steps * (1 - smallest) / (steps - 1)
        ours = a * shift / (1 + shift * (a - 1))
    terminal = shift / steps / (1 + (shift - 1) / steps)
    settings: dict[str, Any] = {
        "shift": ours,
        "shift_terminal": terminal,
        "use_dynamic_shifting": False,
    }
    return FlowMatchLCMScheduler(**(_known(FlowMatchLCMScheduler, config | _STRAIGHT) | settings))


def _known(cls: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What of a scheduler's configuration another class has too."""
    accepted = signature(cls).parameters
    return {name: value for name, value in settings.items() if name in accepted}
