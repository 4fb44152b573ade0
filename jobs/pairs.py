"""`dmd pairs`: prompts → teacher on Ray Data → a sealed pair data set (stations 1-4)."""

import _thread
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from dmd_core.teacher import teacher_revision
from jobs.errors import Exit, JobError
from jobs.pair_checks import check_sampling
from jobs.placement import DATA_CPUS, check_room, pairs_demand
from jobs.plans import with_space
from jobs.session import Session
from jobs.teacher_here import TeacherHere, pair_source
from pipelines.config import PairsSection
from pipelines.costs import (
    MeasuredPairs,
    Rate,
    Work,
    estimate,
    measured_pairs,
    pair_rate,
)
from pipelines.factory import Changes, Outcome, PairOrder, fill_order, order_changes
from pipelines.pairs import fingerprint_of
from pipelines.run_record import Cost
from pipelines.seal import NoUsablePairError
from pipelines.storage import check_writable

_OWN_SIZE = (None, None)  # of rows that name none: the recipe's
_Sizes = Mapping[tuple[int | None, int | None], int]  # (height, width) in pixels → rows to make


def run(session: Session) -> dict[str, Any]:
    """Land the prompts, make the missing pairs, seal; returns the summary."""
    session.open_run()
    outcome = fill(session, "pairs")
    return summary(outcome, session)


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; measures one teacher evaluation, writes nothing."""
    section, cost = session.recipe.pairs, session.recipe.cost
    order, here = pair_order(session), TeacherHere(session)
    changes = order_changes(order)
    to_make, sizes = changes.to_make, changes.sizes
    measured = measured_pairs(
        order.root, section, order.fingerprint.as_dict(), distilled=here.distilled
    )
    needed = _bytes(here, sizes, measured)
    rate = _rate_of_sizes(pair_rate(section, cost, measured, here.rate), here, sizes, measured)
    work = Work(to_make, section.most_actors, section.cpus_per_actor, section.gpus_per_actor)
    plan = {
        "prompts": section.prompts,
        "rows": changes.rows,
        "changes": changes_in_words(changes),
        "rows_to_make": to_make,
        "batches": sum(-(-count // section.batch_size) for count in sizes.values()),
        "blocks": sum(-(-count // section.rows_per_block) for count in sizes.values()),
        "network_evaluations": to_make * here.evaluations(),
        "bytes": needed,
        "writes_to": session.pairs_root.url,
    }
    return with_space(plan | estimate(work, rate, cost), needed, session.pairs_root)


def _bytes(here: TeacherHere, sizes: _Sizes, measured: MeasuredPairs | None) -> int:
    """What a version took for a pair tells it only where all rows have the recipe's size."""
    if measured is None or measured.bytes is None or set(sizes) != {_OWN_SIZE}:
        return here.pair_bytes(sizes)
    return round(sizes[_OWN_SIZE] * measured.bytes)


def _rate_of_sizes(
    rate: Rate, here: TeacherHere, sizes: _Sizes, measured: MeasuredPairs | None
) -> Rate:
    """The rate where rows have sizes of their own: a trial and a recipe tell that of one size."""
    if set(sizes) == {_OWN_SIZE} or rate.seconds is None:
        return rate
    if measured is not None:
        return Rate(rate.seconds, f"{rate.source}, whatever their sizes")
    area = here.mean_area(sizes)
    return Rate(rate.seconds * area, f"{rate.source}; ×{area:.3g} for the area of the rows' sizes")


def fill(session: Session, purpose: str, *, keep: int | None = None) -> Outcome:
    """Bring the recipe's data set up to date, and say what was done. Raises `JobError` with exit
    code 5 when too many rows were rejected."""
    check_writable(session.pairs_root)

    def watch(rows: int) -> AbstractContextManager[Any]:
        session.start_ray()
        check_room(session, pairs_demand(session.recipe), spare_cpus=DATA_CPUS)
        return session.watch(purpose, rows, "pairs", _Cost(session.recipe.pairs))

    def say_changes(changes: Changes) -> None:
        session.display.say(f"{purpose}: {changes_in_words(changes)}")

    try:
        outcome = fill_order(
            pair_order(session),
            watch,
            purpose=f"dmd {purpose}",
            keep=keep,
            on_changes=say_changes,
            on_lost=_thread.interrupt_main,
        )
    except NoUsablePairError as error:
        counts = {"root": session.pairs_root.url, "rows": 0, "rejected": error.rejected}
        raise JobError(str(error), Exit.REJECTS, result=counts) from error
    told = "" if outcome.made else "nothing to do, "
    session.display.done(f"{purpose}: {told}{_describe(outcome, session)}")
    check_rejects(
        outcome.manifest.rows,
        outcome.manifest.rejected,
        session.recipe.pairs.max_rejected_share,
        summary(outcome, session),
    )
    return outcome


def pair_order(session: Session) -> PairOrder:
    """What the recipe asks for; the teacher is checked and its files are hashed."""
    section = session.recipe.pairs
    check_sampling(session)
    return PairOrder(
        section=section,
        source=pair_source(section, session.teacher_dir),
        teacher_url=session.teacher_url,
        fingerprint=fingerprint_of(section, teacher_revision(session.teacher_dir)),
        storage=session.recipe.storage,
        root=session.pairs_root,
    )


def changes_in_words(changes: Changes) -> str:
    """One line for people: what is new, and what follows from it."""
    parts = []
    if changes.settings:
        names = ", ".join(
            f"{name} {_short(then)} → {_short(now)}"
            for name, (then, now) in changes.settings.items()
        )
        parts.append(f"{names}: a new generation")
    if changes.added or changes.removed:
        parts.append(f"rows +{changes.added} −{changes.removed}")
    if changes.settings is None:
        parts.append("no version yet")
    if changes.lost:
        parts.append(f"files of the newest version that are gone: {changes.lost}")
    parts.append(f"{changes.to_make} of {changes.rows} rows to make")
    return "; ".join(parts)


def check_rejects(
    rows: int, rejected: int, allowed: float, result: dict[str, Any] | None = None
) -> None:
    """Raise `JobError` with exit code 5 (and `result`) when more than the `allowed` share was
    rejected."""
    share = rejected / max(1, rows + rejected)
    if share > allowed:
        raise JobError(
            f"the version is sealed, but {rejected} of {rows + rejected} rows were rejected "
            f"({share:.1%}; pairs.max_rejected_share allows {allowed:.1%}). `dmd inspect` shows "
            "the reasons; the same command tries those rows again.",
            Exit.REJECTS,
            result=result,
        )


def summary(outcome: Outcome, session: Session) -> dict[str, Any]:
    manifest, collected = outcome.manifest, outcome.collected
    found = {
        "root": session.pairs_root.url,
        "version": manifest.version,
        "digest": manifest.digest,
        "rows": manifest.rows,
        "rejected": manifest.rejected,
        "generated": outcome.made,
        "cost": outcome.cost,
        "cost_so_far": asdict(outcome.cost_so_far),
    }
    if collected is not None:
        found |= {"collected_versions": collected.versions, "collected_files": collected.files}
    return found


class _Cost:
    """What is shown beside the rate: rejects, and what the generation has cost so far."""

    def __init__(self, section: PairsSection) -> None:
        self._gpus = section.gpus_per_actor

    def __call__(self, fields: dict[str, Any]) -> str:
        busy = fields.get("busy_s", 0.0)
        shown = [str(fields["phase"])] if fields.get("phase") == "sealing" else []
        if fields.get("rejected"):
            shown.append(f"{fields['rejected']} rejected")
        if busy:
            gpu_s = fields.get("earlier_gpu_s", 0.0) + busy * self._gpus
            cpu_s = fields.get("earlier_cpu_s", 0.0) + (0.0 if self._gpus else busy)
            shown.append(f"{cost_in_words(gpu_s, cpu_s)} so far")
        return "  ".join(shown)


def cost_in_words(gpu_s: float, cpu_s: float) -> str:
    """Seconds that teachers computed: on GPUs, times their GPUs, and without (see `Cost`)."""
    parts = [f"{_seconds(gpu_s)} GPU-s"] if gpu_s else []
    if cpu_s or not gpu_s:
        parts.append(f"{_seconds(cpu_s)} teacher-s without a GPU")
    return " and ".join(parts)


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _describe(outcome: Outcome, session: Session) -> str:
    manifest, total = outcome.manifest, outcome.cost_so_far
    parts = [f"{manifest.rows} pairs"]
    if manifest.rejected:
        parts.append(f"{manifest.rejected} rejected")
    text = ", ".join(parts) + f" in {session.pairs_root.url} (version {manifest.version})"
    if outcome.cost:
        now = Cost.of([outcome.cost])
        made = outcome.cost["rows"] - outcome.cost["rejected"]
        text += f"; {made} made now for {cost_in_words(now.gpu_s, now.cpu_s)}"
    text += f"; cost so far {cost_in_words(total.gpu_s, total.cpu_s)}"
    if outcome.collected is not None and outcome.collected.files:
        versions = len(outcome.collected.versions)
        text += f"; collected {versions} old versions, {outcome.collected.files} files"
    return text


def _short(value: Any) -> str:
    return f"{value[:8]}…" if isinstance(value, str) and len(value) > 16 else repr(value)


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("pairs"))
