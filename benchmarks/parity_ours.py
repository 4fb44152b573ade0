"""Our side of every comparison: the inputs of a case → the quantities its reference computed.

Used twice: by `benchmarks.parity`, beside the references, and by `tests/dmd_core/test_parity.py`,
on the golden data. Where a case was run with networks, ours is computed in two ways: end to end
through these networks, or stage by stage, x₀ from the raw outputs that the reference's networks
gave and g from its x₀. At a small σ_t both x₀ are nearly x, so that g is the difference of nearly
equal numbers, and the float32 rounding of x₀ would hide a small error in g.
"""

from collections.abc import Callable

import torch
from diffusers import DDIMScheduler

from benchmarks.parity_reference import THEIRS, Networks, Tensors
from dmd_core.condition import Condition
from dmd_core.denoiser import Denoiser, GuidedDenoiser, NetworkDenoiser, RawNetwork
from dmd_core.losses import (
    distribution_matching_loss,
    dmd_gradient,
    fake_score_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    r1_penalty,
)
from dmd_core.schedule import Schedule, ScoreWeight

# Stable Diffusion 1.5's schedule.
SD_SCHEDULER = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
)
SD = Schedule.from_scheduler(SD_SCHEDULER)
SD_V = Schedule.vp(SD_SCHEDULER.alphas_cumprod, "v_prediction")
SD_X0 = Schedule.vp(SD_SCHEDULER.alphas_cumprod, "sample")
EDM = Schedule.edm()
FLOW = Schedule.flow()


def ours(case: str, inputs: Tensors, networks: Networks | None = None) -> Tensors:
    """Our values of what the reference of `case` computed, by the same names."""
    return CASES[case](inputs, networks)


# ------------------------------------------------------------------ DMD2


def _sd_matching(inputs: Tensors, networks: Networks | None) -> Tensors:
    uncond, cond = Condition(text=inputs["uncond"][:1]), Condition(text=inputs["cond"])
    used = networks or Networks(
        _replay_guided(inputs["eps_real_uncond"], inputs["eps_real"], uncond),
        _replay(inputs["eps_fake"]),
    )
    real = GuidedDenoiser(NetworkDenoiser(used.real, SD), float(inputs["scale"]), uncond)
    fake = NetworkDenoiser(used.fake, SD)
    return _matching(real, fake, inputs, cond, stagewise=networks is None)


def _edm_matching(inputs: Tensors, networks: Networks | None) -> Tensors:
    used = networks or Networks(_replay(inputs["output_real"]), _replay(inputs["output_fake"]))
    real, fake = NetworkDenoiser(used.real, EDM), NetworkDenoiser(used.fake, EDM)
    cond = Condition(labels=inputs["labels"])
    result = _matching(real, fake, inputs, cond, stagewise=networks is None)
    return result | {
        "sigma_t": EDM.coefficients(inputs["t"], inputs["x"])[1],
        "network_input": EDM.network_input(result["x_t"], inputs["t"]),
        "network_time": EDM.network_time(inputs["t"]),
    }


def _matching(
    real: Denoiser, fake: Denoiser, inputs: Tensors, cond: Condition, *, stagewise: bool
) -> Tensors:
    """The gradient, the loss that carries it, and the loss's own derivative by x."""
    x, t = inputs["x"], inputs["t"]
    x_t = real.schedule.diffuse(x, inputs["eps"], t)
    x0_real, x0_fake = real(x_t, t, cond), fake(x_t, t, cond)
    result = {"x_t": x_t, "x0_real": x0_real, "x0_fake": x0_fake}
    if stagewise:
        x0_real, x0_fake = inputs[THEIRS + "x0_real"], inputs[THEIRS + "x0_fake"]
    gradient = dmd_gradient(x, x0_real, x0_fake)
    return result | {"gradient": gradient} | _loss_and_derivative(x, gradient)


def _loss_and_derivative(x: torch.Tensor, gradient: torch.Tensor) -> Tensors:
    x = x.clone().requires_grad_()
    loss = distribution_matching_loss(x, gradient).mean()
    (derivative,) = torch.autograd.grad(loss, x)
    return {"loss": loss.detach(), "loss_derivative": derivative}


def _sd_fake_score(inputs: Tensors, networks: Networks | None) -> Tensors:
    network = _replay(inputs["eps_fake"]) if networks is None else networks.fake
    return _fake_score(SD, network, inputs, Condition(text=inputs["cond"]))


def _edm_fake_score(inputs: Tensors, networks: Networks | None) -> Tensors:
    network = _replay(inputs["output_fake"]) if networks is None else networks.fake
    return _fake_score(EDM, network, inputs, Condition(labels=inputs["labels"]))


def _fake_score(
    schedule: Schedule, network: RawNetwork, inputs: Tensors, cond: Condition
) -> Tensors:
    """The fake score's loss with the weight its teacher was trained with."""
    x_t = schedule.diffuse(inputs["x"], inputs["eps"], inputs["t"])
    x0_fake = NetworkDenoiser(network, schedule)(x_t, inputs["t"], cond)
    weight = schedule.score_weight(inputs["t"])
    loss = fake_score_loss(x0_fake, inputs["x"], weight).mean()
    return {"x_t": x_t, "x0_fake": x0_fake, "loss": loss}


def _sd_gan(inputs: Tensors, _networks: Networks | None) -> Tensors:
    return _gan(SD, inputs)


def _edm_gan(inputs: Tensors, _networks: Networks | None) -> Tensors:
    return _gan(EDM, inputs)


def _gan(schedule: Schedule, inputs: Tensors) -> Tensors:
    """What the discriminator sees in diffusion-GAN, and both losses of its logits."""
    result = {}
    for part, x in (("generator", "x"), ("real", "x_real"), ("fake", "x")):
        x_t = schedule.diffuse(inputs[x], inputs[f"eps_{part}"], inputs[f"t_{part}"])
        result[f"x_t_{part}"] = x_t
    fake, real = inputs["logits_fake"], inputs["logits_real"]
    return result | {
        "generator_loss": gan_generator_loss(inputs["logits_generator"]).mean(),
        "discriminator_loss": gan_discriminator_loss(fake, real).mean(),
    }


# ------------------------------------------------------------------ FastGen


def _fastgen_matching(inputs: Tensors, _networks: Networks | None) -> Tensors:
    x, t = inputs["x"], torch.zeros(len(inputs["x"]), dtype=torch.long)
    uncond = Condition(text=torch.zeros(1, 1, 1))
    network = _replay_guided(inputs["x0_real_uncond"], inputs["x0_real"], uncond)
    guided = GuidedDenoiser(NetworkDenoiser(network, SD_X0), float(inputs["scale"]), uncond)
    x0_real = guided(x, t, Condition(text=torch.ones(len(x), 1, 1)))
    gradient = dmd_gradient(x, x0_real, inputs["x0_fake"])
    return {"x0_real_guided": x0_real} | _loss_and_derivative(x, gradient)


def _fastgen_fake_score(inputs: Tensors, _networks: Networks | None) -> Tensors:
    """Their unweighted errors of ε, v, flow velocity and x₀, as weighted errors of x₀."""
    x, eps, t, output = (inputs[name] for name in ("x", "eps", "t", "output"))
    result = {"edm_sigmas": EDM.sigmas}
    kinds: dict[str, tuple[Schedule, ScoreWeight]] = {
        "epsilon": (SD, "epsilon"),
        "v": (SD_V, "v"),
        "flow": (FLOW, "v"),
        "x0": (SD_X0, "x0"),
    }
    for kind, (schedule, weight) in kinds.items():
        x_t = schedule.diffuse(x, eps, t)
        x0_fake = schedule.x0_from_output(output, x_t, t)
        result |= {
            f"x_t_{kind}": x_t,
            f"x0_{kind}": x0_fake,
            f"loss_{kind}": fake_score_loss(x0_fake, x, schedule.score_weight(t, weight)).mean(),
        }
    return result


def _fastgen_gan(inputs: Tensors, _networks: Networks | None) -> Tensors:
    fake, real, near = (inputs[f"logits_{name}"] for name in ("fake", "real", "near"))
    # Theirs is the squared difference alone: a finite-difference gradient without its 1/σ².
    difference = r1_penalty(real, near, float(inputs["sigma"])) * inputs["sigma"].square()
    return {
        "generator_loss": gan_generator_loss(fake).mean(),
        "discriminator_loss": gan_discriminator_loss(fake, real).mean(),
        "r1_difference": difference.mean(),
    }


CASES: dict[str, Callable[[Tensors, Networks | None], Tensors]] = {
    "dmd2_sd_matching": _sd_matching,
    "dmd2_sd_fake_score": _sd_fake_score,
    "dmd2_sd_gan": _sd_gan,
    "dmd2_edm_matching": _edm_matching,
    "dmd2_edm_fake_score": _edm_fake_score,
    "dmd2_edm_gan": _edm_gan,
    "fastgen_matching": _fastgen_matching,
    "fastgen_fake_score": _fastgen_fake_score,
    "fastgen_gan": _fastgen_gan,
}


# ------------------------------------------------------------------ networks that repeat


def _replay(output: torch.Tensor) -> RawNetwork:
    """A network that says what it said before."""
    return lambda x, time, cond: output


def _replay_guided(
    output_uncond: torch.Tensor, output: torch.Tensor, uncond: Condition
) -> RawNetwork:
    """The same for a guided pair: the rows whose text is `uncond`'s get the first output."""

    def network(x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        is_uncond = (cond.text == uncond.text).flatten(1).all(dim=1).view(-1, 1, 1, 1)
        repeats = (len(x) // len(output), 1, 1, 1)
        return torch.where(is_uncond, output_uncond.repeat(repeats), output.repeat(repeats))

    return network
