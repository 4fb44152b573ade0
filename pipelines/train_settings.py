"""From a recipe's `train` section to what the core takes."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from dmd_core.lora import LoraSettings
from dmd_core.losses import Distance
from dmd_core.networks import TrainerSettings
from dmd_core.parallel import Parallel
from dmd_core.precision import PrecisionPolicy
from dmd_core.train_step import LossSettings
from dmd_core.trainer import StageSettings
from pipelines.stage_settings import StageKeys
from pipelines.train_config import TrainSection


def lora_settings(section: TrainSection) -> LoraSettings | None:
    """None: every weight of the student is trained."""
    if section.trainable == "full":
        return None
    return LoraSettings(section.lora_rank, section.lora_alpha, section.lora_targets)


def trainer_settings(section: TrainSection, seed: int) -> TrainerSettings:
    """What `train` fixes for the whole run, as the core takes it."""
    return TrainerSettings(
        seed=seed,
        timesteps=section.student_timesteps,
        parallel=Parallel(**section.parallel.model_dump()),
        precision=PrecisionPolicy.named(section.mixed_precision),
        lora=lora_settings(section),
        discriminator=section.uses_gan,
        ema_halflife_samples=section.ema_halflife_samples,
        betas=(section.adam_beta1, section.adam_beta2),
        weight_decay=section.adam_weight_decay,
        max_grad_norm=section.max_grad_norm,
        max_nonfinite_updates=section.max_nonfinite_updates,
    )


def stage_settings(
    section: TrainSection, keys: StageKeys, distance: Distance | None
) -> StageSettings:
    """One stage, as the core takes it."""
    return StageSettings(
        losses=LossSettings(
            dm=keys.dm_weight,
            reg=keys.lambda_reg,
            gan=keys.gan_weight,
            dm_weighting=keys.dm_weighting,
            score_weight=section.fake_loss_weight,
            t_min_fraction=keys.t_min_fraction,
            t_max_fraction=keys.t_max_fraction,
            pairs_in_dm=keys.pairs_in_dm,
        ),
        guidance_scale=keys.guidance_scale,
        learning_rate=keys.learning_rate,
        fake_learning_rate=keys.fake_learning_rate or keys.learning_rate,
        batch_size=keys.train_batch_size,
        regression_batch_size=keys.regression_batch_size,
        gan_fake=keys.gan_fake_weight,
        r1=keys.r1_weight,
        distance=distance,
        micro_batch_size=section.micro_batch_size,
    )


def lr_factor(section: TrainSection) -> Callable[[int], float]:
    """step → factor of the stage's learning rate: diffusers' schedules over the whole run."""
    nothing = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule: Any = get_scheduler(
        section.lr_scheduler,
        nothing,
        num_warmup_steps=section.lr_warmup_steps,
        num_training_steps=section.total_steps,
    )
    return schedule.lr_lambdas[0]
