"""Fail at the door: can this teacher make the pairs that the recipe asks for? No weights are
loaded for it."""

from dmd_core.families import check_guidance, folder_geometry
from dmd_core.ode import SolverError, make_scheduler
from dmd_core.teacher import folder_scheduler
from jobs.errors import Exit, JobError
from jobs.session import Session


def check_sampling(session: Session) -> None:
    """Raises an error that names the keys: guidance, size, solver."""
    section, folder = session.recipe.pairs, session.teacher_dir
    check_guidance(folder, {"pairs.guidance_scale": section.guidance_scale})
    try:
        folder_geometry(folder).shape(section.height, section.width)
    except ValueError as error:
        raise JobError(f"pairs.height, pairs.width: {error}", Exit.USAGE) from error
    check_solver(session)


def check_solver(session: Session) -> None:
    """Can `pairs.solver` integrate the ODE of this teacher? Also a training without pairs samples
    its teacher with it, and is evaluated with it."""
    config = folder_scheduler(session.teacher_dir).config
    try:
        make_scheduler(session.recipe.pairs.solver, config, image_tokens=1)  # any: it is not run
    except SolverError as error:
        raise JobError(f"pairs.solver: {error}", Exit.USAGE) from error
