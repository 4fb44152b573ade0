"""Fail at the door: does the recipe fit the machine, the teacher and the pairs? Before any worker
starts."""

from pathlib import Path

from dmd_core.decoder import check_decoder
from dmd_core.diffusers_networks import middle_of
from dmd_core.export import check_exportable
from dmd_core.families import Family, family_of, folder_geometry, part_config
from dmd_core.lora import check_lora
from dmd_core.losses import REGRESSION_LOSSES
from dmd_core.pass_memory import without_memory
from dmd_core.perceptual import load_perceptual
from dmd_core.precision import PrecisionPolicy
from dmd_core.schedule import Schedule
from dmd_core.teacher import folder_scheduler, teacher_revision
from jobs.errors import Exit, JobError
from jobs.evaluate_checks import check_beside
from jobs.pair_checks import check_scales, check_solver
from jobs.pins import prompt_source
from jobs.session import Session
from pipelines.manifest import load_manifest
from pipelines.pair_fit import PairFit
from pipelines.pins import Pins
from pipelines.prompts import read_prompts
from pipelines.streams import open_pictures
from pipelines.trackers import check_trackers
from pipelines.train_config import TrainSection
from pipelines.train_settings import lora_settings


def check_training(session: Session, pins: Pins) -> dict[str, str]:
    """Raises an error that names the keys; returns the precision policy, in words."""
    precision = check_without_pairs(session)
    _check_pairs(session, pins, Path(session.teacher_dir))
    return precision


def check_without_pairs(session: Session) -> dict[str, str]:
    """As `check_training`, but for the pairs, which may not be there yet."""
    section, folder = session.recipe.train, Path(session.teacher_dir)
    family = family_of(folder)
    _check_trackers(section)
    _check_times(session, folder, family)
    for _, keys in section.plan():
        check_scales(session, {"train.guidance_scale": keys.guidance_scale})
    check_solver(session)
    for _, keys in section.plan():
        if keys.needs_pairs and keys.regression_loss not in REGRESSION_LOSSES:
            load_perceptual(keys.regression_loss, trunk=section.perceptual_trunk or None)
            check_decoder(keys.regression_decoder, folder)
    _check_adapters(section, folder, family)
    _check_middle(section, folder, family)
    if section.evaluation.steps:
        check_beside(session)
    return PrecisionPolicy.named(section.mixed_precision).describe()


def check_before_pairs(session: Session) -> None:
    """All that a training asks before it starts but of the pairs: also what else it reads."""
    section, storage = session.recipe.train, session.recipe.storage
    check_without_pairs(session)
    if section.uses_gan:
        open_pictures(section.real_pictures, storage)
    source = prompt_source(session, paired=section.needs_pairs)
    if source is not None:
        read_prompts(source, storage)


def _check_trackers(section: TrainSection) -> None:
    try:
        check_trackers(section.report_to)
    except ValueError as error:
        raise JobError(str(error), Exit.REFUSED) from error


def _check_times(session: Session, teacher: Path, family: Family) -> None:
    """Can a student of these times be exported?"""
    pairs, section = session.recipe.pairs, session.recipe.train
    scheduler, geometry = folder_scheduler(teacher), folder_geometry(teacher)
    try:
        tokens = geometry.image_tokens(geometry.shape(pairs.height, pairs.width))
        schedule = Schedule.from_scheduler(scheduler, image_tokens=tokens)
        check_exportable(
            schedule, dict(scheduler.config), section.student_timesteps, family, tokens
        )
    except ValueError as error:
        raise JobError(f"teacher.path, train.student_timesteps: {error}", Exit.USAGE) from error


def _check_adapters(section: TrainSection, teacher: Path, family: Family) -> None:
    lora = lora_settings(section)
    if lora is None:
        return
    config = part_config(teacher, family.model)
    network = without_memory(config["_class_name"], config)
    check_lora([name for name, _ in network.named_modules()], lora)


def _check_middle(section: TrainSection, teacher: Path, family: Family) -> None:
    """Has the teacher's network what the discriminator looks at?"""
    if not section.uses_gan:
        return
    config = part_config(teacher, family.model)
    try:
        middle_of(without_memory(config["_class_name"], config), side=8)  # any: it is not run
    except ValueError as error:
        raise JobError(
            f"train.gan_weight, teacher.path: {error}; set it to 0", Exit.USAGE
        ) from error


def _check_pairs(session: Session, pins: Pins, teacher: Path) -> None:
    """Are these pairs of this very teacher, in its shape?"""
    if not pins.versions:
        return
    pairs, root = session.recipe.pairs, session.pairs_root
    fit = PairFit(
        teacher_revision(str(teacher)), folder_geometry(teacher).shape, pairs.height, pairs.width
    )
    for version in pins.versions:
        misfit = fit.misfit(root, load_manifest(root, version))
        if misfit:
            raise JobError(f"{root.url} version {version} {misfit}", Exit.REFUSED)
