"""`dmd evaluate`: student against teacher on held-out prompts, same noise (station 9)."""

from typing import Any

import numpy as np

from jobs.config import resolve_shipped
from jobs.errors import JobError
from jobs.export import EXPORTED
from jobs.pins import pinned_manifest
from jobs.session import Session
from pipelines.batches import PairReader
from pipelines.evaluation import METRICS, evaluate
from pipelines.prompts import read_prompts
from pipelines.systems import Networks

_MEAN_ROWS = 2048  # rows of the pair set that the mean picture is taken over


def run(session: Session) -> dict[str, Any]:
    """Sample every system, measure, write `metrics.json`."""
    recipe = session.recipe
    exported = session.read_json(EXPORTED)
    if exported is None:
        raise JobError(f"{session.store.url} has no student; run `dmd export` first")
    inputs = {
        "evaluate": recipe.evaluate.model_dump(mode="json"),
        "step": exported["step"],
        "pairs_digest": exported["pairs_digest"],
        "teacher_revision": exported["teacher_revision"],
    }
    metrics = session.read_json(METRICS)
    if metrics is not None and metrics["provenance"].get("inputs") == inputs:
        session.display.done("evaluate: nothing to do, metrics.json is up to date")
        return metrics
    prompts = read_prompts(resolve_shipped(recipe.evaluate.prompts), recipe.storage).prompts
    networks = Networks(
        teacher=session.teacher_url,
        student=exported["student"],
        storage=recipe.storage,
        mean=_mean_latents(session),
        threads=recipe.pairs.threads_per_actor,
    )
    with session.watch("evaluate", 1, "pictures") as board:
        metrics = evaluate(
            recipe.evaluate,
            recipe.pairs,
            run=session.store,
            networks=networks,
            prompts=prompts,
            student_timesteps=recipe.train.student_timesteps,
            provenance={"inputs": inputs, "versions": session.read_json("versions.json")},
            on_progress=lambda done, total: board.set.remote(done=done, total=total),
        )
    session.display.done(f"evaluate: {session.store.url}/{METRICS}")
    return metrics


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; touches nothing."""
    section = session.recipe.evaluate
    prompts = read_prompts(resolve_shipped(section.prompts), session.recipe.storage).prompts
    return {
        "prompts": min(len(prompts), section.max_prompts or len(prompts)),
        "systems": 4 + session.recipe.train.needs_pairs + len(section.few_steps),
        "writes_to": f"{session.store.url}/{METRICS}",
    }


def _mean_latents(session: Session) -> np.ndarray | None:
    """The mean of the teacher's latents over (up to 2,048 rows of) the training pairs: (C,h,w);
    None for a run without pairs."""
    manifest = pinned_manifest(session)
    if manifest is None:
        return None
    reader = PairReader(session.pairs_root, manifest, seed=0)
    rows = np.arange(min(len(reader), _MEAN_ROWS))
    return reader.rows(rows).latents.float().mean(dim=0).numpy()


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("evaluate"))
