"""tianweiy/DMD2's side of `benchmarks.train`: the `train_one_step` of its two training scripts.

Their `Trainer` is made without its constructor, which wants a data set, a prompt file and a wandb
account; everything else is theirs: models, accelerate, optimizers, the step. Only the
discriminator's head is ours, because theirs is as wide as the real networks' bottleneck.
"""

import math
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn
from transformers import CLIPTokenizer

from benchmarks.parity_reference import add_clone
from benchmarks.train_networks import (
    GAN_WEIGHTS,
    GUIDANCE_SCALE,
    LEARNING_RATE,
    STAND_INS,
    Case,
    Contestant,
    edm_network,
    prompts,
    real_pictures,
)
from dmd_core.fake_score import DiscriminatorHead

_NEVER = 1 << 60


def dmd2(case: Case) -> Contestant:
    """The networks of `case` and one iteration of their training: as many of their steps as the
    fake score has updates, the first of which updates the generator too."""
    add_clone(Path(case.clone), stand_ins=STAND_INS)
    accelerator = Accelerator(mixed_precision="no", cpu=not case.gpu)
    trainer = (_edm_trainer if case.path == "edm" else _sd_trainer)(case, accelerator)
    _prepare(trainer, accelerator, case)

    def step() -> None:
        for _ in range(case.fake_updates):
            trainer.train_one_step()
            trainer.step += 1

    guidance = trainer.model.guidance_model
    modules = [guidance.real_unet, trainer.model.feedforward_model, guidance.fake_unet]
    return Contestant(step, modules + ([guidance.cls_pred_branch] if case.gan else []))


def _arguments(case: Case, **more: Any) -> SimpleNamespace:
    """Those of experiments/sdv1.5 and experiments/imagenet."""
    return SimpleNamespace(
        model_id=case.folder,
        min_step_percent=0.02,
        max_step_percent=0.98,
        num_train_timesteps=1000,
        use_fp16=case.precision == "bf16",
        diffusion_gan=True,
        diffusion_gan_max_timestep=1000,
        initialie_generator=True,
        **more,
    )


# ------------------------------------------------------------------ Stable Diffusion


def _sd_trainer(case: Case, accelerator: Accelerator) -> Any:
    from main.sd_unified_model import SDUniModel  # type: ignore[import-not-found]
    from main.train_sd import Trainer  # type: ignore[import-not-found]

    arguments = _arguments(
        case,
        real_guidance_scale=GUIDANCE_SCALE,
        fake_guidance_scale=1.0,
        gan_alone=False,
        cls_on_clean_image=case.gan,
        gen_cls_loss=case.gan,
        sdxl=False,
        gradient_checkpointing=False,
        grid_size=2,
        conditioning_timestep=999,
        backward_simulation=False,
        denoising=False,
        denoising_timestep=1000,
        num_denoising_step=1,
        generator_lora=False,
        tiny_vae=False,
        dm_loss_weight=1.0,
    )
    model = SDUniModel(arguments, accelerator)
    guidance = model.guidance_model
    if case.gan:
        guidance.cls_pred_branch = _head(case, guidance.fake_unet.config.block_out_channels)
    if case.precision == "bf16" and not case.gpu:
        # Theirs names CUDA; on a CPU the same autocast has to be named so.
        for part in (model, guidance):
            part.network_context_manager = torch.autocast("cpu", dtype=torch.bfloat16)
    tokenizer = CLIPTokenizer.from_pretrained(case.folder, subfolder="tokenizer")
    tokens, nothing = (
        tokenizer(
            list(texts),
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(case.device)
        for texts in (prompts(case), [""])
    )
    model.text_encoder.to(case.device)
    latents = real_pictures(case).to(case.device)
    text = {"text_input_ids_one": tokens.unsqueeze(1)}
    trainer = Trainer.__new__(Trainer)
    with torch.no_grad():
        trainer.uncond_embedding = model.text_encoder(nothing)[0]
    generator_weight, guidance_weight = GAN_WEIGHTS["sd"]
    vars(trainer).update(
        args=arguments,
        model=model,
        latent_channel=case.shape[0],
        latent_resolution=case.shape[1],
        dataloader=repeat(text),
        guidance_dataloader=repeat(text),
        # A new one each time: their model adds the embedding to it.
        real_dataloader=({"images": latents, **text} for _ in repeat(None)),
        sdxl=False,
        denoising=False,
        cls_on_clean_image=case.gan,
        gen_cls_loss=case.gan,
        gen_cls_loss_weight=generator_weight,
        guidance_cls_loss_weight=guidance_weight,
        log_loss=False,
    )
    return trainer


# ------------------------------------------------------------------ EDM


def _edm_trainer(case: Case, accelerator: Accelerator) -> Any:
    from main.edm import edm_guidance  # type: ignore[import-not-found]
    from main.edm.edm_unified_model import EDMUniModel  # type: ignore[import-not-found]
    from main.edm.train_edm import Trainer  # type: ignore[import-not-found]

    arguments = _arguments(
        case, sigma_data=0.5, sigma_max=80.0, sigma_min=0.002, rho=7.0, gan_classifier=case.gan
    )
    arguments.model_id = __file__  # opened, but not read
    loader = SimpleNamespace(load=lambda _file: {"ema": edm_network(case)})
    with (
        mock.patch.object(edm_guidance, "get_edm_network", lambda _: edm_network(case)),
        mock.patch.object(edm_guidance, "pickle", loader),
    ):
        model = EDMUniModel(arguments, accelerator)
    if case.gan:
        settings = case.edm
        channels = [settings["model_channels"] * mult for mult in settings["channel_mult"]]
        model.guidance_model.cls_pred_branch = _head(case, channels)
    pictures = real_pictures(case).to(case.device) / 2 + 0.5
    labels = torch.tensor([[int(name)] for name in prompts(case)], device=case.device)
    generator_weight, guidance_weight = GAN_WEIGHTS["edm"]
    trainer = Trainer.__new__(Trainer)
    vars(trainer).update(
        args=arguments,
        model=model,
        resolution=case.shape[1],
        real_image_dataloader=repeat({"images": pictures, "class_labels": labels}),
        eye_matrix=torch.eye(case.edm["label_dim"], device=case.device),
        label_dim=case.edm["label_dim"],
        conditioning_sigma=80.0,
        gan_classifier=case.gan,
        gen_cls_loss_weight=generator_weight,
        cls_loss_weight=guidance_weight,
    )
    return trainer


# ------------------------------------------------------------------ both


def _prepare(trainer: Any, accelerator: Accelerator, case: Case) -> None:
    """Optimizers, schedulers and accelerate as their constructors set them up."""
    model = trainer.model
    parts = {"generator": model.feedforward_model, "guidance": model.guidance_model}
    for name, part in parts.items():
        optimizer = torch.optim.AdamW(
            [parameter for parameter in part.parameters() if parameter.requires_grad],
            lr=LEARNING_RATE,
            betas=(0.9, 0.999),
            weight_decay=0.01,
        )
        scheduler = get_scheduler(
            "constant_with_warmup", optimizer=optimizer, num_warmup_steps=1, num_training_steps=1000
        )
        part, optimizer, scheduler = accelerator.prepare(part, optimizer, scheduler)
        setattr(model, {"generator": "feedforward_model", "guidance": "guidance_model"}[name], part)
        setattr(trainer, f"optimizer_{name}", optimizer)
        setattr(trainer, f"scheduler_{name}", scheduler)
    vars(trainer).update(
        accelerator=accelerator,
        step=case.fake_updates,  # a multiple: the first step updates the generator, none is drawn
        batch_size=case.batch_size,
        wandb_iters=_NEVER,
        dfake_gen_update_ratio=case.fake_updates,
        max_grad_norm=10.0,
        num_train_timesteps=1000,
    )


def _head(case: Case, channels: Any) -> nn.Module:
    size = math.ceil(case.shape[1] / 2 ** (len(channels) - 1))
    return DiscriminatorHead(channels[-1], size).layers.to(case.device)
