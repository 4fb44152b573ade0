"""How far the training in a run's folder has come, by its checkpoints."""

from typing import Any

from dmd_core.checkpoint import committed_steps, read_state
from jobs.session import Session
from pipelines.run_end import is_finished
from pipelines.run_folder import CHECKPOINTS


def saved_steps(session: Session) -> list[int]:
    return committed_steps(session.store.fs, session.store.path(CHECKPOINTS))


def finished_state(session: Session, steps: list[int]) -> dict[str, Any] | None:
    """The last checkpoint's state of a run that has come to its end; None: there is work to do.
    `steps`: those that have a checkpoint."""
    if not steps:
        return None
    state = newest_state(session, steps)
    return state if is_finished(state, session.recipe.train) else None


def newest_state(session: Session, steps: list[int]) -> dict[str, Any]:
    return read_state(session.store.fs, session.store.path(CHECKPOINTS), steps[-1])
