"""Is there anything left to train? By what the last checkpoint says and by the settings of now.

A training that `evaluation.patience` ended notes in its state how many evaluations had shown no
gain by then, not that it is over: with more patience, or none, it goes on.
"""

from collections.abc import Mapping
from typing import Any

from pipelines.beside_settings import EvaluationSection
from pipelines.train_config import TrainSection

ENDED_EARLY = "ended_early"  # in a checkpoint's state: what `early_end` gave; None: it was not


def early_end(section: EvaluationSection, without_gain: int) -> dict[str, Any]:
    """What to keep of an end by `patience`. `without_gain`: so many evaluations in a row."""
    return {"metric": section.metric, "without_gain": without_gain}


def why_early(state: Mapping[str, Any], section: TrainSection) -> str:
    """Why the training of a checkpoint with this `state` is over before the end of its plan, in
    words; "": it is not, or no longer."""
    found, asked = state.get(ENDED_EARLY), section.evaluation
    if found is None or not asked.steps or asked.patience is None:
        return ""
    if found["metric"] != asked.metric or found["without_gain"] < asked.patience:
        return ""
    return (
        f"{found['without_gain']} evaluations without a better {asked.metric} "
        f"(train.evaluation.patience: {asked.patience})"
    )


def is_finished(state: Mapping[str, Any], section: TrainSection) -> bool:
    """Has the training of a checkpoint with this `state` come to an end?"""
    total = section.total_steps
    if state["step"] >= total:
        return True
    if state.get(ENDED_EARLY) is not None:
        return bool(why_early(state, section))
    return state["finished"] and state["total_steps"] == total
