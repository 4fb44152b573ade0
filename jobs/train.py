"""`dmd train`: distributed DMD and DMD2 training with Ray Train (stations 5-7)."""

from dataclasses import asdict
from typing import Any

from dmd_core.checkpoint import committed_steps, read_state
from jobs.pins import run_pins
from jobs.session import Session
from pipelines.manifest import latest_manifest

CHECKPOINTS = "checkpoints"


def run(session: Session) -> dict[str, Any]:
    """Train to the end of the last stage, from the newest checkpoint if there is one."""
    recipe = session.recipe
    session.open_run()
    pins = run_pins(session)
    result = {"pairs_digest": pins.digest}
    done = _finished_step(session)
    if done is not None:
        session.display.done(f"train: nothing to do, step {done} is reached")
        return {"step": done, "trained": False} | result
    from jobs.train_checks import check_training
    from pipelines.training import train_loop
    from pipelines.workers import run_worker_group

    precision = check_training(session, pins)
    steps = _steps(session)
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
    return {"step": step, "trained": True} | result


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; touches nothing."""
    section = session.recipe.train
    steps = _steps(session)
    manifest = latest_manifest(session.pairs_root)
    remaining = max(0, section.total_steps - (steps[-1] if steps else 0))
    stages = [
        f"{stage.name or index}: {stage.steps or f'{stage.samples} samples'}"
        for index, (stage, _) in enumerate(section.plan())
    ]
    return {
        "pairs": "none sealed yet" if manifest is None else f"version {manifest.version}",
        "rows": 0 if manifest is None else manifest.rows,
        "stages": "; ".join(stages),
        "from_step": steps[-1] if steps else 0,
        "steps_to_do": remaining,
        "samples": sum(stage_samples(stage, keys) for stage, keys in section.plan()),
        "workers": section.num_workers,
        "writes_to": session.store.url,
    }


def stage_samples(stage, keys) -> int:
    """Student samples of a whole stage, over all workers: fresh ones and those on stored noise."""
    from pipelines.train_config import stage_steps

    paired = keys.regression_batch_size if keys.needs_pairs else 0
    return stage_steps(stage, keys) * (keys.train_batch_size * keys.fake_updates + paired)


def _steps(session: Session) -> list[int]:
    return committed_steps(session.store.fs, session.store.path(CHECKPOINTS))


def _finished_step(session: Session) -> int | None:
    """The last step of a run that has reached the end of its plan; None: there is work to do."""
    steps = _steps(session)
    if not steps:
        return None
    state = read_state(session.store.fs, session.store.path(CHECKPOINTS), steps[-1])
    same_plan = state["total_steps"] == session.recipe.train.total_steps
    reached = steps[-1] >= session.recipe.train.total_steps
    return steps[-1] if state["finished"] and (same_plan or reached) else None


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("train"))
