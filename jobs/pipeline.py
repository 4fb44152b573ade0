"""`dmd pipeline`: regenerate → train → export → evaluate → report, as one job.

What is finished is skipped, step by step (pipelines.chain says when), so that the same command
goes on after a kill, does what follows from changed prompts or settings, or does nothing.
"""

import _thread
import argparse
import os
import time
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from dmd_core.files import is_local
from jobs import export, report
from jobs.errors import Exit, JobError
from jobs.pipeline_base import Chain, Step
from jobs.pipeline_door import Door
from jobs.pipeline_steps import NAMES, STEPS
from jobs.session import Session
from pipelines.chain import FOLDER, StepRecord, Verdict, forget_record, write_record
from pipelines.commits import delete_if_there
from pipelines.lease import hold_lease
from pipelines.storage import Store, check_writable

LATEST, LATEST_LINK = "latest.json", "latest"
_REDO = f"{FOLDER}/redo.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dmd pipeline` takes beside the common options."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--from",
        dest="redo_from",
        choices=NAMES,
        help="do this step and the later ones again, even if nothing has changed",
    )
    which.add_argument(
        "--only",
        choices=NAMES,
        help="this step alone, on what the earlier ones left",
    )


def run(session: Session) -> dict[str, Any]:
    """Every step that is due; returns what each did and where the results lie."""
    check_writable(session.store)
    chain, door, only = Chain(session), Door(session), _asked(session, "only")
    redo_from = _asked(session, "redo_from")
    with _Writing(session.store, session.recipe.pairs.lease_seconds) as writing:
        if redo_from:
            door.check(_from(redo_from))
            writing.begin()
            _redo(chain, redo_from)
        steps = [_step(only)] if only else STEPS
        if only:
            _check_inputs(chain, steps[0])
        done = {step.name: _settle(chain, step, door, writing) for step in steps}
        writing.check()
        results = _publish(chain) if not only else {}
    return {"steps": done} | results


def plan(session: Session) -> dict[str, Any]:
    """Skip or run, and why, for each step; with the verb's own plan of each that would run, and
    what these add up to. Writes nothing."""
    chain, door, only = Chain(session), Door(session), _asked(session, "only")
    redo_from, found, plans = _asked(session, "redo_from"), {}, {}
    for step in STEPS:
        if only and step.name != only:
            found[step.name] = "left out: --only"
            continue
        if only:
            _check_inputs(chain, step)
        verdict = _foreseen(chain, step, next(iter(plans), ""), redo_from)
        found[step.name] = verdict.in_words
        if verdict.due:
            door.check([only] if only else _from(step.name))
            # Pairs are where they are, whatever is trained on them.
            anew = step.name != NAMES[0] and (NAMES[0] in plans or redo_from in NAMES[:2])
            plans[step.name] = step.plan(chain, anew=anew)
    for name, steps_plan in plans.items():
        found |= {f"{name}.{key}": value for key, value in steps_plan.items()}
    return found | _total(plans.values())


def _total(plans: Collection[dict[str, Any]]) -> dict[str, Any]:
    """Of the estimates; what one of them does not know is not there."""
    found: dict[str, Any] = {}
    rated = [plan for plan in plans if "rate" in plan]
    if rated and all("estimated_seconds" in plan for plan in rated):
        found["estimated_seconds"] = sum(plan["estimated_seconds"] for plan in rated)
    if rated and all("currency" in plan for plan in rated):
        cost = round(sum(plan["cost"] for plan in rated), 4)
        found |= {"cost": cost, "currency": rated[0]["currency"]}
    return found


# ------------------------------------------------------------------------ one step


def _settle(chain: Chain, step: Step, door: Door, writing: "_Writing") -> dict[str, Any]:
    """Run the step if it is due; returns what was done."""
    verdict = step.verdict(chain)
    if verdict.due and not _asked(chain.session, "only"):
        door.check(_from(step.name)[1:])  # the step's own verb asks for itself
    if verdict.due and writing.begin():
        chain.forget_training()  # another chain may have done it while we waited
        verdict = step.verdict(chain)
    if not verdict.due:
        chain.session.display.done(f"{step.name}: nothing to do, {verdict.why}")
        return {"ran": False, "why": verdict.why}
    redo_from = _asked(chain.session, "redo_from")
    if verdict.is_new and redo_from and NAMES.index(step.name) >= NAMES.index(redo_from):
        verdict = replace(verdict, why=f"asked for with --from {redo_from}")
    chain.session.display.say(f"{step.name}: {verdict.why}")
    started, inputs = time.monotonic(), step.inputs(chain)
    writing.check()
    if not verdict.is_new:
        step.drop(chain)
    step.run(chain)
    output = step.output(chain)
    if output is None:
        raise JobError(
            f"{step.session(chain).store.url}: what {step.name} wrote is gone again; is somebody "
            "else at work in this folder? The same command goes on",
            Exit.TRANSIENT,
        )
    writing.check()
    seconds = round(time.monotonic() - started, 3)
    record = StepRecord(step.name, inputs, output, _now(), seconds)
    write_record(step.session(chain).store, record)
    return {"ran": True, "why": verdict.why, "seconds": seconds, "output": output}


def _foreseen(chain: Chain, step: Step, due: str, redo_from: str) -> Verdict:
    """`due`: the first earlier step that would run, so that inputs are not known yet."""
    if step.left_out(chain):
        return step.verdict(chain)
    if redo_from and NAMES.index(step.name) >= NAMES.index(redo_from):
        return Verdict(True, f"asked for with --from {redo_from}")
    if due:
        return Verdict(True, f"if {due} changes what goes in")
    return step.verdict(chain)


def _check_inputs(chain: Chain, step: Step) -> None:
    """Refuse a step alone whose inputs were never made."""
    for earlier in STEPS[: NAMES.index(step.name)]:
        if not earlier.left_out(chain) and not earlier.is_done(chain):
            where = earlier.session(chain).store.url
            raise JobError(
                f"--only {step.name} works on what {earlier.name} leaves, and there is none of "
                f"that in {where}; run with --only {earlier.name} first, or without --only",
                Exit.REFUSED,
            )


def _redo(chain: Chain, first: str) -> None:
    """Forget the step `first` and the later ones, once: a redo that was killed goes on."""
    session = chain.session
    if (session.read_json(_REDO) or {}).get("from") == first and _is_due(chain):
        session.display.say(f"pipeline: going on with --from {first}")
        return
    for step in map(_step, _from(first)):
        if step.left_out(chain):
            continue
        step.redo(chain)
        forget_record(step.session(chain).store, step.name)
        if not step.output(chain) and step is STEPS[0]:
            break  # without pairs there is no training yet
    session.write_json(_REDO, {"from": first})


def _is_due(chain: Chain) -> bool:
    """Is there anything to do? In order, for what goes into a step is known when the earlier ones
    are done. Steps alone (--only) finish a redo, too, and leave its mark."""
    return any(step.verdict(chain).due for step in STEPS)


# ------------------------------------------------------------------------ the whole


def _publish(chain: Chain) -> dict[str, Any]:
    """Say which training is the newest one, and where its results lie."""
    session, store = chain.session, chain.run.store
    results = {
        "training": store.url,
        "student": store.at(export.STUDENT).url,
        "report": store.at(report.REPORT).url,
    }
    if session.read_json(LATEST) != results:
        session.write_json(LATEST, results)
        _link(session.store, chain.training.folder)
    delete_if_there(session.store, session.store.path(_REDO))
    session.display.say(f"report   {results['report']}\nstudent  {results['student']}")
    return results


def _link(store: Store, folder: str) -> None:
    """On a disk `latest` leads to the training. It is for people: `latest.json` is what counts."""
    if not is_local(store.fs):
        return
    temporary = store.path(f"{LATEST_LINK}.{os.getpid()}.tmp")
    if not folder:
        with suppress(OSError):
            os.remove(store.path(LATEST_LINK))
        return
    with suppress(OSError):  # a disk without links, or a folder of that name
        os.symlink(folder, temporary)
        os.replace(temporary, store.path(LATEST_LINK))
    with suppress(FileNotFoundError):
        os.remove(temporary)


class _Writing:
    """One chain at a time works in a run folder. Nothing is held while there is nothing to do.

    `check` comes before every write of the chain itself, and the verbs have leases of their own:
    so a store that does not answer for a while costs nothing."""

    def __init__(self, store: Store, period_s: float) -> None:
        self._store, self._period_s = store.at(FOLDER), period_s
        self._stack, self._lease = ExitStack(), None

    def __enter__(self) -> "_Writing":
        return self

    def begin(self) -> bool:
        """True: the folder is ours from here on; False: it was already. Raises `LeaseHeldError`."""
        if self._lease is not None:
            return False
        held = hold_lease(
            self._store,
            period_s=self._period_s,
            purpose="dmd pipeline",
            patient=True,  # a training outlasts a store that is away; it is not to end it
            on_lost=_thread.interrupt_main,
        )
        self._lease = self._stack.enter_context(held)
        return True

    def check(self) -> None:
        """Raises `LeaseLostError` when another process has taken over what was begun."""
        if self._lease is not None:
            self._lease.check()

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)


def _asked(session: Session, name: str) -> str:
    return getattr(session.arguments, name, None) or ""


def _step(name: str) -> Step:
    return STEPS[NAMES.index(name)]


def _from(name: str) -> tuple[str, ...]:
    """This step and the later ones."""
    return NAMES[NAMES.index(name) :]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("pipeline"))
