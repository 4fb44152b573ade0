"""Runs tianweiy/DMD2's guidance classes on tiny networks and records what went in and came out.

Their constructors run too: the networks are saved in the form each constructor loads. Only the
discriminator's head is replaced, because theirs is as wide as the real UNets' bottleneck.
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks.parity_ours import SD_SCHEDULER
from benchmarks.parity_reference import (
    THEIRS,
    Case,
    Networks,
    Tensors,
    add_clone,
    recorded_calls,
    recorded_draws,
    shake,
)
from dmd_core.condition import Condition
from dmd_core.denoiser import RawNetwork
from dmd_core.diffusers_networks import DiffusersNetwork

SD_FILES = ("main/sd_guidance.py", "main/utils.py", "main/sd_unet_forward.py")
EDM_FILES = ("main/edm/edm_guidance.py", "third_party/edm/training/networks.py")
_STAND_INS = ("imageio", "imageio.v2", "distutils", "distutils.util")
Guidance = Any  # their class
BATCH, NUM_CLASSES, SCALE = 4, 5, 1.75
# The arguments of their training scripts that the losses read (experiments/sdv1.5, imagenet).
_TRAINING = {
    "min_step_percent": 0.02,
    "max_step_percent": 0.98,
    "num_train_timesteps": 1000,
    "use_fp16": False,
    "diffusion_gan": True,
    "diffusion_gan_max_timestep": 1000,
}


def run(clone: Path, seed: int) -> list[Case]:
    """All cases of both guidance classes. The same seed gives the same tensors."""
    add_clone(clone, stand_ins=_STAND_INS)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # they draw from the global generator
    return _stable_diffusion(generator) + _edm(generator)


# ------------------------------------------------------------------ Stable Diffusion


def _stable_diffusion(generator: torch.Generator) -> list[Case]:
    guidance = _sd_guidance(generator)
    x, x_real = (0.8 * torch.randn(BATCH, 4, 8, 8, generator=generator) for _ in range(2))
    cond = torch.randn(BATCH, 3, 16, generator=generator)
    uncond = torch.randn(1, 3, 16, generator=generator).repeat(BATCH, 1, 1)
    networks = Networks(DiffusersNetwork(guidance.real_unet), DiffusersNetwork(guidance.fake_unet))
    text: Tensors = {"cond": cond, "uncond": uncond}
    return [
        Case("dmd2_sd_matching", SD_FILES, _sd_matching(guidance, x, text), networks),
        Case("dmd2_sd_fake_score", SD_FILES, _sd_fake_score(guidance, x, text), networks),
        Case("dmd2_sd_gan", SD_FILES, _gan(guidance, x, x_real, cond)),
    ]


def _sd_guidance(generator: torch.Generator) -> Guidance:
    from main.sd_guidance import SDGuidance  # type: ignore[import-not-found]

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    shake(unet, generator, 0.1)
    with tempfile.TemporaryDirectory() as folder:
        unet.save_pretrained(f"{folder}/unet")
        SD_SCHEDULER.save_pretrained(f"{folder}/scheduler")
        arguments = SimpleNamespace(
            **_TRAINING,
            model_id=folder,
            real_guidance_scale=SCALE,
            fake_guidance_scale=1.0,
            gan_alone=False,
            cls_on_clean_image=True,
            gen_cls_loss=True,
            sdxl=False,
            gradient_checkpointing=False,
        )
        guidance = SDGuidance(arguments, SimpleNamespace(is_local_main_process=False))
    shake(guidance.fake_unet, generator, 0.05)
    guidance.cls_pred_branch = nn.Conv2d(32, 1, kernel_size=4)
    return guidance


def _sd_matching(guidance: Guidance, x: torch.Tensor, text: Tensors) -> Tensors:
    x = x.clone().requires_grad_()
    with (
        recorded_draws("randint", "randn_like") as draws,
        recorded_calls(guidance.real_unet) as real,
        recorded_calls(guidance.fake_unet) as fake,
    ):
        losses, log = guidance.compute_distribution_matching_loss(
            x, text["cond"], text["uncond"], None, None
        )
    eps_real_uncond, eps_real = real[0].output.chunk(2)
    inputs = (
        text
        | _drawn(draws)
        | {
            "x": x.detach(),
            "scale": torch.tensor(SCALE),
            "eps_real_uncond": eps_real_uncond,
            "eps_real": eps_real,
            "eps_fake": fake[0].output,
        }
    )
    return inputs | _theirs_of_matching(losses, log, x)


def _sd_fake_score(guidance: Guidance, x: torch.Tensor, text: Tensors) -> Tensors:
    with (
        recorded_draws("randint", "randn_like") as draws,
        recorded_calls(guidance.fake_unet) as fake,
    ):
        losses, log = guidance.compute_loss_fake(x, text["cond"], text["uncond"])
    inputs = {"x": x, "cond": text["cond"], "eps_fake": fake[0].output} | _drawn(draws)
    return inputs | _theirs_of_fake_score(losses, log)


# ------------------------------------------------------------------ EDM


def _edm(generator: torch.Generator) -> list[Case]:
    guidance = _edm_guidance(generator)
    x, x_real = (0.5 * torch.randn(BATCH, 3, 8, 8, generator=generator) for _ in range(2))
    labels = torch.randint(NUM_CLASSES, (BATCH,), generator=generator)
    networks = Networks(_edm_network(guidance.real_unet), _edm_network(guidance.fake_unet))
    gan = _gan(guidance, x, x_real, _one_hot(labels))
    return [
        Case("dmd2_edm_matching", EDM_FILES, _edm_matching(guidance, x, labels), networks),
        Case("dmd2_edm_fake_score", EDM_FILES, _edm_fake_score(guidance, x, labels), networks),
        Case("dmd2_edm_gan", EDM_FILES, gan),
    ]


def _edm_guidance(generator: torch.Generator) -> Guidance:
    from main.edm import edm_guidance  # type: ignore[import-not-found]
    from third_party.edm.training.networks import EDMPrecond  # type: ignore[import-not-found]

    def tiny_network(_arguments: SimpleNamespace | None = None) -> nn.Module:
        return EDMPrecond(
            img_resolution=8,
            img_channels=3,
            label_dim=NUM_CLASSES,
            model_channels=32,
            channel_mult=[1, 2],
            num_blocks=1,
            attn_resolutions=[],
            dropout=0.0,
        )

    teacher = tiny_network()
    shake(teacher, generator, 0.1)
    arguments = SimpleNamespace(
        **_TRAINING,
        model_id=__file__,  # opened, but not read
        sigma_data=0.5,
        sigma_max=80.0,
        sigma_min=0.002,
        rho=7.0,
        gan_classifier=True,
    )
    loader = SimpleNamespace(load=lambda _file: {"ema": teacher})
    with (
        mock.patch.object(edm_guidance, "get_edm_network", tiny_network),
        mock.patch.object(edm_guidance, "pickle", loader),
    ):
        guidance = edm_guidance.EDMGuidance(arguments, None)
    shake(guidance.fake_unet, generator, 0.05)
    guidance.cls_pred_branch = nn.Conv2d(64, 1, kernel_size=4)
    return guidance


def _edm_network(preconditioned: Any) -> RawNetwork:
    """The network inside their preconditioning; ours is `Schedule`'s."""

    def network(x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        assert cond.labels is not None
        return preconditioned.model(x, time, class_labels=_one_hot(cond.labels))

    return network


def _one_hot(labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.one_hot(labels, NUM_CLASSES).float()


def _edm_matching(guidance: Guidance, x: torch.Tensor, labels: torch.Tensor) -> Tensors:
    x = x.clone().requires_grad_()
    with (
        recorded_draws("randint", "randn_like") as draws,
        recorded_calls(guidance.real_unet.model) as real,
        recorded_calls(guidance.fake_unet.model) as fake,
    ):
        losses, log = guidance.compute_distribution_matching_loss(x, _one_hot(labels))
    inputs = _drawn(draws) | {
        "x": x.detach(),
        "labels": labels,
        "output_real": real[0].output,
        "output_fake": fake[0].output,
        THEIRS + "network_input": real[0].args[0],
        THEIRS + "network_time": real[0].args[1],
        THEIRS + "sigma_t": guidance.karras_sigmas[log["dmtrain_timesteps"]],
    }
    return inputs | _theirs_of_matching(losses, log, x)


def _edm_fake_score(guidance: Guidance, x: torch.Tensor, labels: torch.Tensor) -> Tensors:
    with (
        recorded_draws("randint", "randn_like") as draws,
        recorded_calls(guidance.fake_unet.model) as fake,
    ):
        losses, log = guidance.compute_loss_fake(x, _one_hot(labels))
    inputs = {"x": x, "labels": labels, "output_fake": fake[0].output} | _drawn(draws)
    return inputs | _theirs_of_fake_score(losses, log)


# ------------------------------------------------------------------ both


def _drawn(draws: dict[str, list[torch.Tensor]]) -> Tensors:
    """Their only times and their only noise, by our names."""
    (t,), (eps,) = draws["randint"], draws["randn_like"]
    return {"t": t.flatten(), "eps": eps}


def _theirs_of_matching(losses: Tensors, log: Tensors, x: torch.Tensor) -> Tensors:
    (derivative,) = torch.autograd.grad(losses["loss_dm"], x)
    theirs = {
        "x_t": log["dmtrain_noisy_latents"],
        "x0_real": log["dmtrain_pred_real_image"],
        "x0_fake": log["dmtrain_pred_fake_image"],
        "gradient": log["dmtrain_grad"],
        "loss": losses["loss_dm"],
        "loss_derivative": derivative,
    }
    return _prefixed(theirs)


def _theirs_of_fake_score(losses: Tensors, log: Tensors) -> Tensors:
    theirs = {
        "x_t": log["faketrain_noisy_latents"],
        "x0_fake": log["faketrain_x0_pred"],
        "loss": losses["loss_fake_mean"],
    }
    return _prefixed(theirs)


def _gan(guidance: Guidance, x: torch.Tensor, x_real: torch.Tensor, cond: torch.Tensor) -> Tensors:
    """Their generator's and their discriminator's loss, with what the discriminator was shown."""
    seen = mock.patch.object(guidance.fake_unet, "forward", wraps=guidance.fake_unet.forward)
    with (
        torch.no_grad(),
        recorded_draws("randint", "randn_like") as draws,
        recorded_calls(guidance.cls_pred_branch) as logits,
        seen as forward,
    ):
        generator = guidance.compute_generator_clean_cls_loss(x, cond)
        discriminator, _ = guidance.compute_guidance_clean_cls_loss(x_real, x, cond, cond)
    inputs: Tensors = {"x": x, "x_real": x_real}
    theirs: Tensors = {
        "generator_loss": generator["gen_cls_loss"],
        "discriminator_loss": discriminator["guidance_cls_loss"],
    }
    for index, part in enumerate(("generator", "real", "fake")):
        inputs |= {
            f"t_{part}": draws["randint"][index],
            f"eps_{part}": draws["randn_like"][index],
            f"logits_{part}": logits[index].output.flatten(),
        }
        theirs[f"x_t_{part}"] = forward.call_args_list[index].args[0]
    return inputs | _prefixed(theirs)


def _prefixed(theirs: Tensors) -> Tensors:
    return {THEIRS + name: value.detach() for name, value in theirs.items()}
