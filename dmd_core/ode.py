"""Station 3: the teacher's probability-flow ODE, integrated by diffusers' own schedulers.

Only deterministic solvers are allowed: a stochastic one defines no noise→picture function, and
then a stored pair means nothing.
"""

from collections.abc import Callable

import diffusers
import torch

from dmd_core.denoiser import RawNetwork

# name → (diffusers class, settings that make it a deterministic ODE solver)
SOLVERS: dict[str, tuple[str, dict]] = {
    # Latents are not pictures: clipping x₀ to [−1, 1], this class's default, would be wrong.
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpmsolver++": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"},
    ),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
}


def make_scheduler(solver: str, config: dict):
    """A fresh diffusers scheduler for `solver`, on the noise schedule of the teacher's `config`."""
    if solver not in SOLVERS:
        raise ValueError(
            f"solver {solver!r} is not one of the deterministic solvers {', '.join(SOLVERS)}"
        )
    class_name, settings = SOLVERS[solver]
    return getattr(diffusers, class_name).from_config(dict(config), **settings)


@torch.no_grad()
def integrate(
    network: RawNetwork,
    scheduler,
    eps: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor,
    *,
    steps: int,
    guidance_scale: float,
    on_step: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """x₀ of the guided ODE started at ε: (B,C,H,W) → (B,C,H,W), in the dtype of `eps`.

    `cond` and `uncond` are (B,L,D). Matches `StableDiffusionPipeline.__call__` on the same latents
    step for step; guidance is the standard scale, and 1.0 or less means none, as in diffusers.
    """
    scheduler.set_timesteps(steps, device=eps.device)
    x_t = eps * scheduler.init_noise_sigma
    guided = guidance_scale > 1.0
    both = torch.cat([uncond, cond]) if guided else cond
    for index, t in enumerate(scheduler.timesteps):
        x_in = scheduler.scale_model_input(torch.cat([x_t, x_t]) if guided else x_t, t)
        output = network(x_in, t.expand(len(x_in)), both)
        if guided:
            output_uncond, output_cond = output.chunk(2)
            output = output_uncond + guidance_scale * (output_cond - output_uncond)
        x_t = scheduler.step(output, t, x_t, return_dict=False)[0]
        if on_step is not None:
            on_step(index)
    return x_t
