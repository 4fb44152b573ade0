"""`dmd train`: distributed DMD and DMD2 training with Ray Train (stations 5-7)."""

import argparse
from dataclasses import asdict
from typing import Any, cast

from dmd_core.checkpoint import committed_steps, damage, discard_checkpoint, read_state
from jobs.display import loss_fields
from jobs.errors import Exit, JobError
from jobs.pins import PINNED, pin_in_dataset, run_pins, save_pins
from jobs.placement import check_room, train_demand
from jobs.plans import with_space
from jobs.session import Session
from pipelines.costs import Work, estimate, step_rate
from pipelines.following import PinHolder
from pipelines.health_record import read_events
from pipelines.manifest import ManifestError, latest_manifest
from pipelines.memory_plan import NetworkSizes, checkpoint_bytes
from pipelines.parallel_settings import WorkerRange
from pipelines.pins import Pins
from pipelines.run_folder import CHECKPOINTS
from pipelines.train_config import StageKeys, StageSection, stage_steps
from pipelines.weights import denoiser_of, pipeline_weights

PREVIOUS = "previous"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dmd train` takes beside the common options."""
    parser.add_argument(
        "--from",
        dest="start",
        choices=[PREVIOUS],
        help="previous: if the newest checkpoint cannot be read, put it aside and go on from the "
        "one before it",
    )


def run(session: Session) -> dict[str, Any]:
    """Train to the end of the last stage, from the newest checkpoint if there is one."""
    session.open_run()
    if getattr(session.arguments, "start", None) == PREVIOUS:
        _put_newest_aside(session)
    steps = _steps(session)
    done = _finished(session, steps)
    if done is not None:
        _settle_evaluations(session)
        session.display.done(f"train: nothing to do, step {done['step']} is reached")
        return _result(done, trained=False)
    try:
        pins, pin, precision = _agree(session, steps)
    except ManifestError:  # perhaps collected just now: what is newest then?
        pins, pin, precision = _agree(session, steps)
    if steps:
        session.display.say(f"train: going on from step {steps[-1]}")
    session.display.say("train: networks in " + precision["networks"])
    _train(session, pins, pin)
    _settle_evaluations(session)
    done = _newest_state(session, _steps(session))
    _say_health(session)
    session.display.done(f"train: {done['step']} steps, {session.store.url}")
    result = _result(done, trained=True)
    if pin is not None:
        session.display.say(
            f"train: pairs stay pinned for evaluation and longer training (version "
            f"{_listed(result['pairs_versions'])}); dmd inspect {session.pairs_root.url} "
            f"--unpin {pin.name} ends that"
        )
    return result


def _settle_evaluations(session: Session) -> None:
    """Nothing to do, but where a run was killed while it waited for its last evaluations."""
    if session.recipe.train.evaluation.steps:
        from jobs.train_evaluation import settle_evaluations

        settle_evaluations(session, _steps(session))


def _say_health(session: Session) -> None:
    for event in read_events(session.store):
        followed = {
            "warn": "",
            "stop": ": stopped",
            "rollback": f": went back to step {event.to_step} with learning rates × "
            f"{event.learning_rate_factor:g}, fake_updates × {event.fake_updates_factor:g}",
        }
        session.display.say(
            f"train: health: {event.rule} at step {event.step}{followed[event.kind]}"
        )


def _train(session: Session, pins: Pins, pin: PinHolder | None) -> None:
    """The Ray Train job. Raises what ended it for good."""
    import ray

    from jobs.train_evaluation import training_evaluation
    from pipelines.beside import validation_config
    from pipelines.training import train_loop
    from pipelines.workers import run_worker_group

    recipe = session.recipe
    teacher_url = session.teacher_url if session.teacher_dir else ""
    with session.watch("train", recipe.train.total_steps, "steps", _shown) as board:
        task = training_evaluation(session)
        check_room(session, train_demand(recipe))
        run_worker_group(
            train_loop,
            {
                "train": recipe.train.model_dump(),
                "pairs": recipe.pairs.model_dump(),
                "storage": recipe.storage.model_dump(),
                "seed": recipe.run.seed,
                "dir": session.store.url,
                "teacher": teacher_url,
                "root": session.pairs_root.url,
                "pins": asdict(pins),
                "pin": None if pin is None else asdict(pin),
                "evaluation": None if task is None else asdict(task),
                "board": board,
            },
            store=session.store,
            num_workers=recipe.train.group_size,
            cpus_per_worker=recipe.train.cpus_per_worker,
            use_gpu=recipe.train.use_gpu,
            max_failures=recipe.train.max_failures,
            placement=recipe.train.placement,
            validation=validation_config(task),
        )
        failure = ray.get(board.failure.remote())
    if failure is not None:
        raise cast(Exception, failure)


def _put_newest_aside(session: Session) -> None:
    """The newest checkpoint, if it cannot be read: so that the same command again goes on."""
    steps, fs, root = _steps(session), session.store.fs, session.store.path(CHECKPOINTS)
    what = damage(fs, root, steps[-1]) if steps else ""
    if not what:
        session.display.say("train: the newest checkpoint is whole; none is put aside")
        return
    if len(steps) < 2:
        raise JobError(
            f"--from previous: {what}, and there is no checkpoint before it; to start afresh, use "
            "another run.dir",
            Exit.REFUSED,
        )
    discard_checkpoint(fs, root, steps[-1])
    session.display.say(f"train: {what}; step {steps[-1]} is put aside, back to step {steps[-2]}")


def _agree(session: Session, steps: list[int]) -> tuple[Pins, PinHolder | None, dict[str, str]]:
    """What the run reads, checked and then bound; and the networks' precision, in words."""
    from jobs.train_checks import check_training

    pins = run_pins(session, started=bool(steps))
    precision = check_training(session, pins)
    versions = set(pins.versions)
    if not steps:
        _check_begins_from(session, pins)
    if steps:
        followed = _newest_state(session, steps)["pairs_segments"]
        versions |= {segment["version"] for segment in followed}
    pin = pin_in_dataset(session, versions) if versions else None
    save_pins(session, pins)
    return pins, pin, precision


def _check_begins_from(session: Session, pins: Pins) -> None:
    """A training of a chain is to read the versions that it was chosen for."""
    chosen = getattr(session.arguments, "pairs_versions", None)
    if chosen is not None and chosen != pins.versions:
        raise JobError(
            f"{session.pairs_root.url}: another version was sealed just now; run the same command "
            "again to train on that one",
            Exit.TRANSIENT,
        )


def _result(state: dict[str, Any], *, trained: bool) -> dict[str, Any]:
    return {
        "step": state["step"],
        "trained": trained,
        "pairs_digest": state["pairs_digest"],
        "pairs_versions": sorted({segment["version"] for segment in state["pairs_segments"]}),
    }


def _listed(versions: list[int]) -> str:
    return ", ".join(map(str, versions))


def _shown(fields: dict[str, Any]) -> str:
    return f"{loss_fields(fields)}  {fields.get('pairs', '')}".strip()


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; touches nothing."""
    section, steps = session.recipe.train, _steps(session)
    from_step = steps[-1] if steps else 0
    finished = _finished(session, steps) is not None
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
        "samples": sum(stage_samples(stage, keys) for stage, keys in section.plan()),
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
    weights = pipeline_weights(session.teacher_dir)
    sizes = NetworkSizes.of(weights, denoiser_of(weights), section)
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


def stage_samples(stage: StageSection, keys: StageKeys) -> int:
    """Student samples of a whole stage, over all workers: fresh ones and those on stored noise."""
    paired = keys.regression_batch_size if keys.needs_pairs else 0
    return stage_steps(stage, keys) * (keys.train_batch_size * keys.fake_updates + paired)


def _steps(session: Session) -> list[int]:
    return committed_steps(session.store.fs, session.store.path(CHECKPOINTS))


def _finished(session: Session, steps: list[int]) -> dict[str, Any] | None:
    """The last checkpoint's state of a run that has reached the end of its plan; None: there is
    work to do. `steps`: those that have a checkpoint."""
    if not steps:
        return None
    state = _newest_state(session, steps)
    total = session.recipe.train.total_steps
    finished = state["finished"] and state["total_steps"] == total
    return state if finished or steps[-1] >= total else None


def _newest_state(session: Session, steps: list[int]) -> dict[str, Any]:
    return read_state(session.store.fs, session.store.path(CHECKPOINTS), steps[-1])


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("train"))
