"""The evaluation beside a training, as `dmd train` asks for it."""

from dmd_core.checkpoint import prune_checkpoints
from jobs.errors import Exit, JobError
from jobs.evaluate_checks import check_beside
from jobs.session import Session
from pipelines.beside import finish_evaluations, unplaceable
from pipelines.beside_results import kept_steps, pending_evaluations, read_results
from pipelines.beside_task import EvaluationTask, evaluation_task
from pipelines.run_folder import CHECKPOINTS


def training_evaluation(session: Session) -> EvaluationTask | None:
    """None: the recipe asks for none. Fails at the door where none could ever run. Ray must be
    initialised."""
    import ray

    from dmd_core.teacher import teacher_revision

    recipe = session.recipe
    section = recipe.train.evaluation
    if not section.steps:
        return None
    why_not = unplaceable(section, ray.cluster_resources())
    if why_not:
        raise JobError(why_not, Exit.REFUSED)
    prompts = check_beside(session)
    return evaluation_task(
        section,
        recipe.train,
        evaluate=recipe.evaluate,
        pairs=recipe.pairs,
        storage=recipe.storage,
        run=session.store.url,
        teacher=session.teacher_url,
        teacher_revision=teacher_revision(session.teacher_dir),
        prompts=prompts,
    )


def settle_evaluations(session: Session, steps: list[int]) -> None:
    """Do what a finished training still owes, because it was killed while it waited. The recipe
    asks for evaluations."""
    session.start_ray()
    task = training_evaluation(session)
    assert task is not None
    store, section = session.store, task.settings
    due = pending_evaluations(store, steps, section, task.inputs, finished=True)
    finish_evaluations(task, due)
    kept = kept_steps(read_results(store, task.inputs), (), section)
    keep = session.recipe.train.checkpoints_total_limit
    prune_checkpoints(store.fs, store.path(CHECKPOINTS), keep, kept)  # nothing waits any more
