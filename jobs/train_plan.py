"""What `dmd train --dry-run` tells: steps, samples, checkpoints' room, time and cost."""

from typing import Any

from jobs.pins import PINNED
from jobs.plans import with_space
from jobs.session import Session
from jobs.train_state import finished_state, saved_steps
from pipelines.costs import Work, estimate, step_rate
from pipelines.manifest import latest_manifest
from pipelines.memory_plan import checkpoint_bytes
from pipelines.network_sizes import NetworkSizes
from pipelines.parallel_settings import WorkerRange
from pipelines.stage_settings import StageKeys, StageSection, stage_steps
from pipelines.weights import pipeline_weights


def plan(session: Session) -> dict[str, Any]:
    """What `dmd train` would do; touches nothing. Refuses what `dmd train` would, but for pairs."""
    section, steps = session.recipe.train, saved_steps(session)
    from_step = steps[-1] if steps else 0
    finished = finished_state(session, steps) is not None
    if not finished:
        from jobs.train_checks import check_before_pairs  # imports Ray's libraries: here alone

        check_before_pairs(session)
    kept = session.read_json(PINNED) if steps else None
    version = (
        kept["default"] if kept else getattr(latest_manifest(session.pairs_root), "version", 0)
    )
    stages = {
        f"stage {index} {stage.name}".rstrip(): _stage_in_words(stage, keys)
        for index, (stage, keys) in enumerate(section.plan())
    }
    pairs = f"version {version}" if version else "none sealed yet"
    if section.follow_pairs != "no":
        pairs += f", then the newest one at each {section.follow_pairs}"
    to_do = 0 if finished else max(0, section.total_steps - from_step)
    needed = _checkpoint_space(session) if to_do else 0
    plan = {
        "pairs": pairs if section.needs_pairs else "none needed",
        **stages,
        "from_step": from_step,
        "steps_to_do": to_do,
        "samples": sum(_stage_samples(stage, keys) for stage, keys in section.plan()),
        "workers": _workers_in_words(session.recipe.train.num_workers),
        "bytes": needed,
        "writes_to": session.store.url,
    }
    return with_space(plan | _estimate(session, to_do), needed, session.store)


def _estimate(session: Session, steps: int) -> dict[str, Any]:
    """Time and cost. A step is one of the whole group: all its workers are busy at once."""
    section, cost = session.recipe.train, session.recipe.cost
    workers = section.most_workers
    cpus, gpus = workers * section.cpus_per_worker, float(workers * section.use_gpu)
    return estimate(Work(steps, 1, cpus, gpus), step_rate(session.store, section, cost), cost)


def _checkpoint_space(session: Session) -> int:
    """Of all checkpoints that are kept at once, and of the one being written."""
    section = session.recipe.train
    folder = session.teacher_dir
    sizes = NetworkSizes.of(folder, pipeline_weights(folder), section, session.recipe.pairs)
    best = section.evaluation.best_checkpoints_limit if section.evaluation.steps else 0
    return checkpoint_bytes(sizes, section) * (section.checkpoints_total_limit + best + 1)


def _workers_in_words(workers: int | WorkerRange) -> str:
    if isinstance(workers, WorkerRange):
        return f"{workers.min} to {workers.max}, as many as there is room for"
    return str(workers)


def _stage_in_words(stage: StageSection, keys: StageKeys) -> str:
    """When it ends, and what it changes."""
    ends = f"{stage.steps} steps" if stage.steps else f"{stage.samples} samples"
    if stage.until is not None:
        bound = (
            f"< {stage.until.below}" if stage.until.below is not None else f"> {stage.until.above}"
        )
        ends += f" or {stage.until.metric} {bound}"
    changes = ", ".join(f"{key} {value}" for key, value in stage.changes().items())
    return f"{ends} of {keys.train_batch_size}" + (f" ({changes})" if changes else "")


def _stage_samples(stage: StageSection, keys: StageKeys) -> int:
    """Student samples of a whole stage, over all workers: fresh ones and those on stored noise."""
    paired = keys.regression_batch_size if keys.needs_pairs else 0
    return stage_steps(stage, keys) * (keys.train_batch_size * keys.fake_updates + paired)
