"""Runs NVlabs/FastGen's losses and noise schedules and records what went in and came out."""

from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.parity_ours import SD_SCHEDULER
from benchmarks.parity_reference import THEIRS, Case, Tensors, add_clone

LOSS_FILE = "fastgen/methods/common_loss.py"
METHOD_FILE = "fastgen/methods/distribution_matching/dmd2.py"
SCHEDULE_FILE = "fastgen/networks/noise_schedule.py"
_STAND_INS = (
    "omegaconf",
    "loguru",
    "scipy",
    "ftfy",
    "einops",
    "imageio",
    "imageio.v3",
    "fastgen.configs.opt",
)
BATCH, SHAPE, SCALE, SIGMA = 4, (4, 8, 8), 1.75, 0.1


def run(clone: Path, seed: int) -> list[Case]:
    """All cases. The same seed gives the same tensors."""
    add_clone(clone, stand_ins=_STAND_INS, bare=("fastgen.methods",))
    import fastgen.methods  # type: ignore[import-not-found]

    fastgen.methods.FastGenModel = object  # the base class of DMD2Model; none of it is used
    generator = torch.Generator().manual_seed(seed)
    return [
        Case("fastgen_matching", (LOSS_FILE, METHOD_FILE), _matching(generator)),
        Case("fastgen_fake_score", (LOSS_FILE, SCHEDULE_FILE), _fake_score(generator)),
        Case("fastgen_gan", (LOSS_FILE, METHOD_FILE), _gan(generator, seed)),
    ]


def _normal(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(BATCH, *SHAPE, generator=generator)


def _matching(generator: torch.Generator) -> Tensors:
    """Guidance of the teacher, then the loss that carries the gradient."""
    from fastgen.methods.common_loss import (  # type: ignore[import-not-found]
        variational_score_distillation_loss,
    )
    from fastgen.methods.distribution_matching.dmd2 import (  # type: ignore[import-not-found]
        DMD2Model,
    )

    x, x0_real, x0_real_uncond, x0_fake = (_normal(generator) for _ in range(4))
    model = SimpleNamespace(
        config=SimpleNamespace(guidance_scale=SCALE, skip_layers=None),
        teacher=lambda x_t, t, **_: x0_real_uncond,
    )
    guided = DMD2Model._apply_classifier_free_guidance(model, x, None, x0_real)
    leaf = x.clone().requires_grad_()
    loss = variational_score_distillation_loss(leaf, guided, x0_fake)
    (derivative,) = torch.autograd.grad(loss, leaf)
    return {
        "x": x,
        "x0_real": x0_real,
        "x0_real_uncond": x0_real_uncond,
        "x0_fake": x0_fake,
        "scale": torch.tensor(SCALE),
        THEIRS + "x0_real_guided": guided,
        THEIRS + "loss": loss.detach(),
        THEIRS + "loss_derivative": derivative,
    }


def _fake_score(generator: torch.Generator) -> Tensors:
    """The denoising loss of every prediction type, with the schedules' conversions to x₀."""
    from fastgen.methods.common_loss import (  # type: ignore[import-not-found]
        denoising_score_matching_loss,
    )
    from fastgen.networks import noise_schedule  # type: ignore[import-not-found]

    x, eps, output = (_normal(generator) for _ in range(3))
    t = torch.randint(20, 980, (BATCH,), generator=generator)
    sd = noise_schedule.AlphasNoiseSchedule(SD_SCHEDULER.alphas_cumprod)
    flow = noise_schedule.RFNoiseSchedule()
    # Their times are fractions, truncated to an index (t/1000 may fall one short of t); a flow's
    # time is its σ, which at our index t is (t + 1)/1000.
    sd_time, flow_time = (t + 0.5) / 1000, (t + 1.0).double() / 1000
    result = {
        "x": x,
        "eps": eps,
        "t": t,
        "output": output,
        THEIRS + "edm_sigmas": noise_schedule.EDMNoiseSchedule().sigmas,
    }
    kinds = {"epsilon": ("eps", sd), "v": ("v", sd), "flow": ("flow", flow), "x0": ("x0", sd)}
    for kind, (pred_type, schedule) in kinds.items():
        time = flow_time if kind == "flow" else sd_time
        x_t = schedule.forward_process(x, eps, time)
        x0 = schedule.convert_model_output(x_t, output, time, pred_type, "x0")
        loss = denoising_score_matching_loss(pred_type, output, x, eps, schedule, time)
        result |= {
            f"{THEIRS}x_t_{kind}": x_t,
            f"{THEIRS}x0_{kind}": x0,
            f"{THEIRS}loss_{kind}": loss,
        }
    return result


def _gan(generator: torch.Generator, seed: int) -> Tensors:
    """Both losses of given logits, and the approximate R1 penalty of a linear discriminator."""
    from fastgen.methods.common_loss import (  # type: ignore[import-not-found]
        gan_loss_discriminator,
        gan_loss_generator,
    )
    from fastgen.methods.distribution_matching.dmd2 import (  # type: ignore[import-not-found]
        DMD2Model,
    )

    fake, real = (3 * torch.randn(BATCH, 1, generator=generator) for _ in range(2))
    x_real = _normal(generator)
    kept: list[torch.Tensor] = []

    def discriminator(features: torch.Tensor) -> torch.Tensor:
        kept.append(features.flatten(1).mean(dim=1, keepdim=True))
        return kept[-1]

    discriminator.feature_indices = None
    model = SimpleNamespace(
        config=SimpleNamespace(gan_r1_reg_alpha=SIGMA),
        teacher=lambda x_t, t, **_: x_t,
        discriminator=discriminator,
    )
    torch.manual_seed(seed)  # they draw from the global generator
    difference = DMD2Model._compute_r1_regularization(model, real, x_real, None)
    return {
        "logits_fake": fake.flatten(),
        "logits_real": real.flatten(),
        "logits_near": kept[0].flatten(),
        "sigma": torch.tensor(SIGMA),
        THEIRS + "generator_loss": gan_loss_generator(fake),
        THEIRS + "discriminator_loss": gan_loss_discriminator(real, fake),
        THEIRS + "r1_difference": difference,
    }
