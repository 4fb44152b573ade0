"""`dmd train`: distributed DMD training on the sealed pairs, with Ray Train (stations 5-7)."""

from typing import Any

from dmd_core.checkpoint import committed_steps
from jobs.errors import Exit, JobError
from jobs.session import Session
from pipelines.manifest import Manifest, latest_manifest, load_manifest

CHECKPOINTS = "checkpoints"
PINNED = "pairs.json"


def run(session: Session) -> dict[str, Any]:
    """Train to `max_train_steps`, from the newest checkpoint if there is one."""
    recipe = session.recipe
    session.open_run()
    manifest = pinned_manifest(session)
    steps = committed_steps(session.store.fs, session.store.path(CHECKPOINTS))
    if steps and steps[-1] >= recipe.train.max_train_steps:
        session.display.done(f"train: nothing to do, step {steps[-1]} is reached")
        return {"step": steps[-1], "trained": False, "pairs_digest": manifest.digest}
    from pipelines.training import train_loop
    from pipelines.workers import run_worker_group

    if steps:
        session.display.say(f"train: going on from step {steps[-1]}")
    teacher_url = session.teacher_url if session.teacher_dir else ""
    with session.watch("train", recipe.train.max_train_steps, "steps") as board:
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
                "version": manifest.version,
                "digest": manifest.digest,
                "board": board,
            },
            store=session.store,
            num_workers=recipe.train.num_workers,
            cpus_per_worker=recipe.train.cpus_per_worker,
            use_gpu=recipe.train.use_gpu,
            max_failures=recipe.train.max_failures,
        )
    session.display.done(f"train: {recipe.train.max_train_steps} steps, {session.store.url}")
    return {
        "step": recipe.train.max_train_steps,
        "trained": True,
        "pairs_digest": manifest.digest,
    }


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; touches nothing."""
    section = session.recipe.train
    steps = committed_steps(session.store.fs, session.store.path(CHECKPOINTS))
    manifest = latest_manifest(session.pairs_root)
    remaining = max(0, section.max_train_steps - (steps[-1] if steps else 0))
    per_step = section.train_batch_size + section.regression_batch_size
    return {
        "pairs": "none sealed yet" if manifest is None else f"version {manifest.version}",
        "rows": 0 if manifest is None else manifest.rows,
        "from_step": steps[-1] if steps else 0,
        "steps_to_do": remaining,
        "samples_to_do": remaining * per_step,
        "workers": section.num_workers,
        "writes_to": session.store.url,
    }


def pinned_manifest(session: Session) -> Manifest:
    """The version of the pairs that this run reads: the newest at its start, then fixed."""
    pinned = session.read_json(PINNED)
    if pinned is not None:
        manifest = load_manifest(session.pairs_root, pinned["version"])
        if manifest.digest != pinned["digest"]:
            raise JobError(
                f"{session.pairs_root.url} version {pinned['version']} is not the one this run "
                f"was started with (digest {manifest.digest[:12]}…, pinned "
                f"{pinned['digest'][:12]}…); use another run.dir",
                Exit.REFUSED,
            )
        return manifest
    manifest = latest_manifest(session.pairs_root)
    if manifest is None:
        raise JobError(
            f"{session.pairs_root.url} has no sealed pairs; run `dmd pairs` with this recipe first"
        )
    session.write_json(PINNED, {"version": manifest.version, "digest": manifest.digest})
    return manifest


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("train"))
