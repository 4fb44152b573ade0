"""Fail at the door: can this teacher make the pairs that the recipe asks for? No weights are
loaded for it."""

from collections.abc import Mapping

from dmd_core.families import CLASSES, check_guidance, family_of, folder_geometry, part_config
from dmd_core.ode import SolverError, make_scheduler
from dmd_core.teacher import class_names, folder_scheduler
from jobs.errors import Exit, JobError
from jobs.session import Session


def check_sampling(session: Session) -> None:
    """Raises an error that names the keys: guidance, size, solver."""
    section, folder = session.recipe.pairs, session.teacher_dir
    check_scales(session, {})
    try:
        folder_geometry(folder).shape(section.height, section.width)
    except ValueError as error:
        raise JobError(f"pairs.height, pairs.width: {error}", Exit.USAGE) from error
    check_solver(session)


def check_scales(session: Session, others: Mapping[str, float]) -> None:
    """Can the teacher be guided by `pairs.guidance_scale`, as sample pictures and evaluations are
    too, and by `others` (key of the recipe → scale)?"""
    asked = {"pairs.guidance_scale": session.recipe.pairs.guidance_scale, **others}
    folder = session.teacher_dir
    check_guidance(folder, asked)
    classes = part_config(folder, family_of(folder).model).get("num_class_embeds")
    named = len(class_names(folder))
    if classes is None or classes == named + 1:
        return
    for key, scale in asked.items():
        if scale != 1.0:
            raise JobError(
                f"{key} is {scale:g}, but the teacher's network has {classes} class labels and "
                f"{CLASSES} names {named}: guidance needs one label more than names, "
                f'"no class". Set {key}: 1.0',
                Exit.USAGE,
            )


def check_solver(session: Session) -> None:
    """Can `pairs.solver` integrate the ODE of this teacher? Also a training without pairs samples
    its teacher with it, and is evaluated with it."""
    config = folder_scheduler(session.teacher_dir).config
    try:
        make_scheduler(session.recipe.pairs.solver, config, image_tokens=1)  # any: it is not run
    except SolverError as error:
        raise JobError(f"pairs.solver: {error}", Exit.USAGE) from error
