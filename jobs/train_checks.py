"""Fail at the door: does the recipe fit the teacher and the pairs? Before any worker starts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from dmd_core.decoder import check_decoder
from dmd_core.export import check_exportable
from dmd_core.lora import check_lora
from dmd_core.losses import REGRESSION_LOSSES
from dmd_core.perceptual import load_perceptual
from dmd_core.precision import PrecisionPolicy
from dmd_core.schedule import Schedule
from dmd_core.teacher import teacher_revision
from jobs.errors import Exit, JobError
from jobs.session import Session
from pipelines.manifest import load_manifest
from pipelines.pair_fit import PairFit
from pipelines.pins import Pins
from pipelines.trackers import check_trackers
from pipelines.train_config import TrainSection
from pipelines.train_settings import lora_settings


def check_training(session: Session, pins: Pins) -> dict[str, str]:
    """Raises an error that names the keys; returns the precision policy, in words."""
    section = session.recipe.train
    check_trackers(section.report_to)
    folder = Path(session.teacher_dir)
    scheduler = _scheduler(folder)
    try:
        schedule = Schedule.from_scheduler(scheduler)
        check_exportable(schedule, dict(scheduler.config), section.student_timesteps)
    except ValueError as error:
        raise JobError(f"teacher.path, train.student_timesteps: {error}", Exit.USAGE) from error
    for _, keys in section.plan():
        if keys.needs_pairs and keys.regression_loss not in REGRESSION_LOSSES:
            load_perceptual(keys.regression_loss, trunk=section.perceptual_trunk or None)
            check_decoder(keys.regression_decoder)
    _check_pairs(session, pins, folder)
    _check_adapters(section, folder)
    return PrecisionPolicy.named(section.mixed_precision).describe()


def _check_adapters(section: TrainSection, teacher: Path) -> None:
    lora = lora_settings(section)
    if lora is None:
        return
    with torch.device("meta"):  # the layers' names, without their weights
        unet = diffusers.UNet2DConditionModel.from_config(_unet_config(teacher))
    check_lora([name for name, _ in unet.named_modules()], lora)


def _check_pairs(session: Session, pins: Pins, teacher: Path) -> None:
    """Are these pairs of this very teacher, in its shape?"""
    if not pins.versions:
        return
    pairs, root = session.recipe.pairs, session.pairs_root
    fit = PairFit(teacher_revision(str(teacher)), _latent_shape(teacher), pairs.height, pairs.width)
    for version in pins.versions:
        misfit = fit.misfit(root, load_manifest(root, version))
        if misfit:
            raise JobError(f"{root.url} version {version} {misfit}", Exit.REFUSED)


def _scheduler(teacher: Path) -> Any:
    """The teacher's scheduler, without its weights."""
    config = json.loads((teacher / "scheduler" / "scheduler_config.json").read_text())
    scheduler = getattr(diffusers, str(config.get("_class_name")), None)
    if scheduler is None:
        raise JobError(f"{teacher}/scheduler is a {config.get('_class_name')}, not of diffusers")
    return scheduler.from_config(config)


def _unet_config(teacher: Path) -> dict[str, Any]:
    return json.loads((teacher / "unet" / "config.json").read_text())


def _latent_shape(teacher: Path) -> Callable[[int | None, int | None], tuple[int, ...]]:
    """(C,h,w) for a height and a width in pixels, without the teacher's weights."""
    unet = _unet_config(teacher)
    vae = json.loads((teacher / "vae" / "config.json").read_text())
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    own = unet["sample_size"] * factor

    def shape(height: int | None, width: int | None) -> tuple[int, ...]:
        return unet["in_channels"], (height or own) // factor, (width or own) // factor

    return shape
