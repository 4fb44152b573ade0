"""`dmd train`: distributed DMD and DMD2 training with Ray Train (stations 5-7)."""

from dataclasses import asdict
from typing import Any

from dmd_core.checkpoint import committed_steps, read_state
from jobs.pins import PINNED, run_pins, save_pins
from jobs.session import Session
from pipelines.manifest import latest_manifest
from pipelines.train_config import StageKeys, StageSection, stage_steps

CHECKPOINTS = "checkpoints"


def run(session: Session) -> dict[str, Any]:
    """Train to the end of the last stage, from the newest checkpoint if there is one."""
    recipe = session.recipe
    session.open_run()
    steps = _steps(session)
    done = _finished(session, steps)
    if done is not None:
        session.display.done(f"train: nothing to do, step {done['step']} is reached")
        return {"step": done["step"], "trained": False, "pairs_digest": done["pairs_digest"]}
    pins = run_pins(session, started=bool(steps))
    from jobs.train_checks import check_training
    from pipelines.training import train_loop
    from pipelines.workers import run_worker_group

    precision = check_training(session, pins)
    save_pins(session, pins)
    if steps:
        session.display.say(f"train: going on from step {steps[-1]}")
    session.display.say("train: networks in " + precision["networks"])
    teacher_url = session.teacher_url if session.teacher_dir else ""
    with session.watch("train", recipe.train.total_steps, "steps") as board:
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
                "board": board,
            },
            store=session.store,
            num_workers=recipe.train.num_workers,
            cpus_per_worker=recipe.train.cpus_per_worker,
            use_gpu=recipe.train.use_gpu,
            max_failures=recipe.train.max_failures,
        )
    step = _steps(session)[-1]
    session.display.done(f"train: {step} steps, {session.store.url}")
    return {"step": step, "trained": True, "pairs_digest": pins.digest}


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
    return {
        "pairs": pairs if section.needs_pairs else "none needed",
        **stages,
        "from_step": from_step,
        "steps_to_do": 0 if finished else max(0, section.total_steps - from_step),
        "samples": sum(stage_samples(stage, keys) for stage, keys in section.plan()),
        "workers": section.num_workers,
        "writes_to": session.store.url,
    }


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
    state = read_state(session.store.fs, session.store.path(CHECKPOINTS), steps[-1])
    total = session.recipe.train.total_steps
    finished = state["finished"] and state["total_steps"] == total
    return state if finished or steps[-1] >= total else None


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("train"))
