"""Fail at the door: can what the recipe wants evaluated be measured? Before anything is sampled,
and before what is to be evaluated is trained."""

from jobs.config import resolve_shipped
from jobs.errors import Exit, JobError
from jobs.session import Session
from pipelines.beside_task import measurable
from pipelines.evaluation import check_evaluation, check_judge, held_out
from pipelines.prompts import read_prompts


def held_out_prompts(session: Session) -> tuple[str, ...]:
    """Those of `evaluate.prompts`. Raises `PromptError`."""
    recipe = session.recipe
    return read_prompts(resolve_shipped(recipe.evaluate.prompts), recipe.storage).prompts


def check_measurable(session: Session, prompts: tuple[str, ...]) -> None:
    """For `dmd evaluate` with these held-out prompts."""
    recipe = session.recipe
    check_evaluation(recipe.evaluate, prompts, session.teacher_dir, recipe.storage)


def check_beside(session: Session) -> tuple[str, ...]:
    """For the evaluations beside a training; returns the held-out prompts."""
    recipe, prompts = session.recipe, held_out_prompts(session)
    section = recipe.train.evaluation
    why_not = measurable(section, recipe.evaluate, session.teacher_dir, prompts)
    if why_not:
        raise JobError(why_not, Exit.USAGE)
    chosen = held_out(prompts, section.max_prompts) * recipe.evaluate.samples_per_prompt
    check_judge(recipe.evaluate, chosen, recipe.storage)
    return prompts
