"""`dmd train`: distributed DMD and DMD2 training with Ray Train (stations 5-7)."""

import _thread
import argparse
from dataclasses import asdict
from typing import Any, cast

from dmd_core.checkpoint import damage, discard_checkpoint
from jobs.display import loss_fields
from jobs.errors import Exit, JobError
from jobs.pins import pin_in_dataset, run_pins, save_pins
from jobs.placement import check_room, train_demand
from jobs.session import Session
from jobs.train_plan import plan
from jobs.train_state import finished_state, newest_state, saved_steps
from pipelines.following import PinHolder
from pipelines.health_record import read_events
from pipelines.lease import Lease, hold_lease
from pipelines.manifest import ManifestError
from pipelines.pins import Pins
from pipelines.run_end import why_early
from pipelines.run_folder import CHECKPOINTS

__all__ = ["add_arguments", "plan", "run"]

PREVIOUS = "previous"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dmd train` takes beside the common options."""
    parser.add_argument(
        "--from",
        dest="start",
        choices=[PREVIOUS],
        help="previous: put aside the checkpoints that cannot be read, and go on from the newest "
        "that can",
    )


def run(session: Session) -> dict[str, Any]:
    """Train to the end of the last stage, from the newest checkpoint if there is one. Raises
    `LeaseHeldError` while another training is at work in the run's folder."""
    session.check_run()
    put_aside = getattr(session.arguments, "start", None) == PREVIOUS
    done = None if put_aside else finished_state(session, saved_steps(session))
    if done is None or session.recipe.train.evaluation.steps:  # evaluations may be due
        with hold_lease(
            session.store,
            period_s=session.recipe.pairs.lease_seconds,
            purpose="dmd train",
            patient=True,
            on_lost=_thread.interrupt_main,
        ) as lease:
            if done is None:
                session.open_run()
            if put_aside:
                _put_damaged_aside(session)
            # Asked again: another process may have done it while we waited for the lease.
            done = finished_state(session, saved_steps(session))
            if done is None:
                return _go_on(session, lease)
            _settle_evaluations(session)
    session.display.done(
        f"train: nothing to do, step {done['step']} is reached{_early(session, done)}"
    )
    return _result(done, trained=False)


def _go_on(session: Session, lease: Lease) -> dict[str, Any]:
    steps = saved_steps(session)
    try:
        pins, pin, precision = _agree(session, steps)
    except ManifestError:  # perhaps collected just now: what is newest then?
        pins, pin, precision = _agree(session, steps)
    if steps:
        session.display.say(f"train: going on from step {steps[-1]}")
    session.display.say("train: networks in " + precision["networks"])
    _train(session, pins, pin, lease)
    _settle_evaluations(session)
    done = newest_state(session, saved_steps(session))
    _say_health(session)
    session.display.done(f"train: {done['step']} steps{_early(session, done)}, {session.store.url}")
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

        settle_evaluations(session, saved_steps(session))


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


def _train(session: Session, pins: Pins, pin: PinHolder | None, lease: Lease) -> None:
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
                "fence": lease.fence,
                "board": board,
            },
            store=session.store,
            num_workers=recipe.train.group_size,
            cpus_per_worker=recipe.train.cpus_per_worker,
            use_gpu=recipe.train.use_gpu,
            max_failures=recipe.train.max_failures,
            stored=lambda: saved_steps(session),
            placement=recipe.train.placement,
            validation=validation_config(task),
        )
        failure = ray.get(board.failure.remote())
    if failure is not None:
        raise cast(Exception, failure)


def _put_damaged_aside(session: Session) -> None:
    """Every checkpoint that cannot be read: so that the same command again goes on. An older one
    counts too, for a run that goes on reads what all of them say."""
    steps, fs, root = saved_steps(session), session.store.fs, session.store.path(CHECKPOINTS)
    found = {step: what for step in steps if (what := damage(fs, root, step))}
    whole = [step for step in steps if step not in found]
    if not found:
        session.display.say("train: all checkpoints are whole; none is put aside")
        return
    if not whole:
        raise JobError(
            f"--from previous: {found[steps[-1]]}, and there is no checkpoint before it; to start "
            "afresh, use another run.dir",
            Exit.REFUSED,
        )
    for step, what in found.items():
        discard_checkpoint(fs, root, step)
        session.display.say(f"train: {what}; step {step} is put aside")
    session.display.say(f"train: step {whole[-1]} is the newest whole one")


def _agree(session: Session, steps: list[int]) -> tuple[Pins, PinHolder | None, dict[str, str]]:
    """What the run reads, checked and then bound; and the networks' precision, in words."""
    from jobs.train_checks import check_training

    pins = run_pins(session, started=bool(steps))
    precision = check_training(session, pins)
    versions = set(pins.versions)
    if not steps:
        _check_begins_from(session, pins)
    if steps:
        followed = newest_state(session, steps)["pairs_segments"]
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


def _early(session: Session, state: dict[str, Any]) -> str:
    why = why_early(state, session.recipe.train)
    return f", ended early: {why}" if why else ""


def _listed(versions: list[int]) -> str:
    return ", ".join(map(str, versions))


def _shown(fields: dict[str, Any]) -> str:
    return f"{loss_fields(fields)}  {fields.get('pairs', '')}".strip()


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("train"))
