"""`dmd evaluate`: student against teacher on held-out prompts, same noise (station 9)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dmd_core.families import guidance_distilled
from dmd_core.teacher import teacher_revision
from jobs.errors import JobError
from jobs.evaluate_checks import check_measurable, held_out_prompts
from jobs.export import EXPORTED, check_student, check_teacher_revision
from jobs.pins import pinned_manifest
from jobs.placement import DATA_CPUS, check_room, evaluate_demand
from jobs.session import Session
from jobs.teacher_here import TeacherHere
from pipelines.batches import PairReader
from pipelines.costs import (
    Rate,
    Work,
    estimate,
    measured_pairs,
    pair_rate,
)
from pipelines.evaluation import (
    METRICS,
    TIMED_WHERE,
    evaluate,
    held_out,
    time_again,
    timing_inputs,
)
from pipelines.images import NUMERICS_VERSION
from pipelines.pairs import fingerprint_of
from pipelines.systems import (
    Networks,
    SamplingPlan,
    network_evaluations,
)

# Where pictures are made, which does not change them.
_WHERE = {"actors", *TIMED_WHERE}
_OF_STUDENT = ("step", "pairs_digest", "teacher_revision", "student_revision")
_MEAN_ROWS = 2048  # rows of the pair set that the mean picture is taken over


def run(session: Session) -> dict[str, Any]:
    """Sample every system, measure, write `metrics.json`. Where only the place of the timing is
    another one, measure that alone."""
    exported = session.read_json(EXPORTED)
    if exported is None:
        raise JobError(f"{session.store.url} has no student; run `dmd export` first")
    session.check_settings()
    prompts = held_out_prompts(session)
    inputs, kept = _inputs(session, exported, prompts), session.read_json(METRICS)
    if kept is not None and kept["provenance"].get("inputs") != inputs:
        kept = None
    if kept is not None and kept["timing"].get("inputs") == _timing_inputs(session):
        session.display.done("evaluate: nothing to do, metrics.json is up to date")
        return kept
    check_measurable(session, prompts)
    check_teacher_revision(
        session, teacher_revision(session.teacher_dir), exported["teacher_revision"]
    )
    student = check_student(session, exported)
    networks = _networks(session, student, None if kept else _mean_latents(session))
    session.start_ray()
    check_room(session, evaluate_demand(session.recipe), spare_cpus=DATA_CPUS)
    if kept is not None:
        session.display.say(
            "evaluate: only the timing is due: its resources changed, or are not known"
        )
        metrics = _time_again(session, networks, prompts, kept)
    else:
        metrics = _evaluate(session, networks, prompts, exported, inputs)
    session.display.done(f"evaluate: {session.store.url}/{METRICS}")
    return metrics


def _networks(session: Session, student: str, mean: np.ndarray | None) -> Networks:
    recipe = session.recipe
    return Networks(
        teacher=session.teacher_url,
        student=student,
        storage=recipe.storage,
        mean=mean,
        gpus=recipe.evaluate.gpus_per_actor,
        threads=recipe.pairs.threads_per_actor,
    )


def _evaluate(
    session: Session,
    networks: Networks,
    prompts: Sequence[str],
    exported: dict[str, Any],
    inputs: dict[str, Any],
) -> dict[str, Any]:
    recipe = session.recipe
    with session.watch("evaluate", 1, "pictures") as board:
        return evaluate(
            recipe.evaluate,
            recipe.pairs,
            run=session.store,
            networks=networks,
            prompts=prompts,
            student_timesteps=recipe.train.student_timesteps,
            revisions={key: exported[key] for key in ("teacher_revision", "student_revision")},
            provenance={"inputs": inputs, "versions": session.read_json("versions.json")},
            on_progress=lambda done, total: board.set.remote(done=done, total=total),
        )


def _time_again(
    session: Session, networks: Networks, prompts: Sequence[str], metrics: dict[str, Any]
) -> dict[str, Any]:
    recipe = session.recipe
    return time_again(
        recipe.evaluate,
        recipe.pairs,
        run=session.store,
        networks=networks,
        prompts=prompts,
        student_timesteps=recipe.train.student_timesteps,
        metrics=metrics,
    )


def _timing_inputs(session: Session) -> dict[str, Any]:
    recipe = session.recipe
    return timing_inputs(recipe.evaluate, recipe.pairs.threads_per_actor)


def _inputs(session: Session, exported: dict[str, Any], prompts: Sequence[str]) -> dict[str, Any]:
    """All that decides the figures: settings, the bytes of the prompts, teacher, student, and how
    both are sampled."""
    inputs = {
        "numerics": NUMERICS_VERSION,
        "evaluate": session.recipe.evaluate.model_dump(mode="json", exclude=_WHERE),
        "plan": asdict(_plan(session)),
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        **{key: exported.get(key) for key in _OF_STUDENT},
    }
    return json.loads(json.dumps(inputs))  # as they are read back


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; touches nothing."""
    recipe, section = session.recipe, session.recipe.evaluate
    prompts = held_out_prompts(session)
    check_measurable(session, prompts)
    count = len(held_out(prompts, section.max_prompts)) * section.samples_per_prompt
    sampling = _plan(session)
    systems = sampling.systems(mean=recipe.train.needs_pairs, real=bool(section.real))
    evaluations = count * _evaluations_per_prompt(session, sampling, systems)
    work = Work(evaluations, section.actors, section.cpus_per_actor, section.gpus_per_actor)
    return {
        "prompts": count,
        "systems": len(systems),
        "network_evaluations": evaluations,
        "writes_to": f"{session.store.url}/{METRICS}",
        **estimate(work, _evaluation_rate(session), recipe.cost),
    }


def _evaluations_per_prompt(session: Session, plan: SamplingPlan, systems: Sequence[str]) -> int:
    """Network evaluations for one prompt by all systems together."""
    folder = Path(session.teacher_dir)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    distilled = guidance_distilled(str(folder))
    return sum(
        network_evaluations(plan, scheduler, system, distilled=distilled) for system in systems
    )


def _plan(session: Session) -> SamplingPlan:
    recipe = session.recipe
    return SamplingPlan.from_sections(recipe.evaluate, recipe.pairs, recipe.train.student_timesteps)


def _evaluation_rate(session: Session) -> Rate:
    """Seconds of one network evaluation of one picture, from those of a pair; decoding and
    measuring come on top."""
    recipe = session.recipe
    pairs = recipe.pairs.model_copy(update={"gpus_per_actor": recipe.evaluate.gpus_per_actor})
    fingerprint = fingerprint_of(pairs, teacher_revision(session.teacher_dir)).as_dict()
    here = TeacherHere(session, pairs)
    measured = measured_pairs(session.pairs_root, pairs, fingerprint, distilled=here.distilled)
    rate = pair_rate(pairs, recipe.cost, measured, here.rate)
    if rate.seconds is None:
        return rate
    return Rate(rate.seconds / here.evaluations(), rate.source)


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
