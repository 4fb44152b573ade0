"""`dmd pairs`: prompts → teacher on Ray Data → a sealed pair data set (stations 1-4)."""

import _thread
from contextlib import AbstractContextManager
from typing import Any

from dmd_core.teacher import teacher_revision
from jobs.config import resolve_shipped
from jobs.errors import Exit, JobError
from jobs.session import Session
from pipelines.config import PairsSection
from pipelines.factory import Changes, Outcome, PairOrder, fill_order, order_changes
from pipelines.pairs import fingerprint_of
from pipelines.prompts import PromptSource
from pipelines.storage import check_writable


def run(session: Session) -> dict[str, Any]:
    """Land the prompts, make the missing pairs, seal; returns the summary."""
    session.open_run()
    outcome = fill(session, "pairs")
    return summary(outcome, session)


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; measures one teacher evaluation, writes nothing."""
    section = session.recipe.pairs
    changes = order_changes(pair_order(session))
    seconds, pair_bytes = _measure(session, section)
    to_make = changes.to_make
    return {
        "prompts": section.prompts,
        "rows": changes.rows,
        "changes": changes_in_words(changes),
        "rows_to_make": to_make,
        "batches": -(-to_make // section.batch_size),
        "blocks": -(-to_make // section.rows_per_block),
        "network_evaluations": to_make * evaluations_per_picture(section),
        "bytes": to_make * pair_bytes,
        "estimated_seconds": round(to_make * seconds / section.most_actors),
        "writes_to": session.pairs_root.url,
    }


def fill(session: Session, purpose: str, *, keep: int | None = None) -> Outcome:
    """Bring the recipe's data set up to date, and say what was done. Raises `JobError` with exit
    code 5 when too many rows were rejected."""
    check_writable(session.pairs_root)

    def watch(rows: int) -> AbstractContextManager[Any]:
        return session.watch(purpose, rows, "pairs", _Cost(session.recipe.pairs))

    def say_changes(changes: Changes) -> None:
        session.display.say(f"{purpose}: {changes_in_words(changes)}")

    outcome = fill_order(
        pair_order(session),
        watch,
        purpose=f"dmd {purpose}",
        keep=keep,
        on_changes=say_changes,
        on_lost=_thread.interrupt_main,
    )
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
    files = (section.prompts,) if isinstance(section.prompts, str) else section.prompts
    return PairOrder(
        section=section,
        source=PromptSource(tuple(map(resolve_shipped, files)), section.prompt_column),
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
    parts.append(f"{changes.to_make} of {changes.rows} rows to make")
    return "; ".join(parts)


def evaluations_per_picture(section: PairsSection) -> int:
    """UNet evaluations of one sample: guidance doubles them."""
    return section.steps * (2 if section.guidance_scale > 1 else 1)


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
    }
    if collected is not None:
        found |= {"collected_versions": collected.versions, "collected_files": collected.files}
    return found


class _Cost:
    """What is shown beside the rate: rejects, and what the run has cost so far."""

    def __init__(self, section: PairsSection) -> None:
        self._gpus, self._cpus = section.gpus_per_actor, section.cpus_per_actor

    def __call__(self, fields: dict[str, Any]) -> str:
        busy = fields.get("busy_s", 0.0)
        shown = [str(fields["phase"])] if fields.get("phase") == "sealing" else []
        if fields.get("rejected"):
            shown.append(f"{fields['rejected']} rejected")
        if busy:
            shown.append(cost_in_words(busy, self._gpus))
        return "  ".join(shown)


def cost_in_words(busy_s: float, gpus_per_actor: float) -> str:
    """Seconds that teachers worked, in GPU-seconds where they had GPUs."""
    if gpus_per_actor:
        return f"{busy_s * gpus_per_actor:.0f} GPU-s"
    return f"{busy_s:.0f} teacher-s, no GPU"


def _measure(session: Session, section: PairsSection) -> tuple[float, int]:
    """(seconds per pair on this machine, bytes of one pair's tensors)."""
    import time

    import torch

    from dmd_core.noise import sample_noise
    from dmd_core.teacher import load_teacher

    teacher = load_teacher(session.teacher_dir)
    shape = teacher.latent_shape(section.height, section.width)
    eps = sample_noise(range(section.batch_size), shape)
    cond = teacher.encode_prompts([""] * section.batch_size)
    t = torch.full((section.batch_size,), teacher.schedule.num_timesteps - 1)
    with torch.no_grad():
        teacher.network()(eps, t, cond)
        started = time.perf_counter()
        teacher.network()(eps, t, cond)
    per_evaluation = (time.perf_counter() - started) / section.batch_size
    width = 2 if section.dtype == "float16" else 4
    return per_evaluation * evaluations_per_picture(section), 2 * width * eps[0].numel()


def _describe(outcome: Outcome, session: Session) -> str:
    manifest, gpus = outcome.manifest, session.recipe.pairs.gpus_per_actor
    parts = [f"{manifest.rows} pairs"]
    if manifest.rejected:
        parts.append(f"{manifest.rejected} rejected")
    text = ", ".join(parts) + f" in {session.pairs_root.url} (version {manifest.version})"
    if outcome.cost:
        spent = cost_in_words(outcome.cost["busy_s"], gpus)
        made = outcome.cost["rows"] - outcome.cost["rejected"]
        text += f"; {made} made now for {spent}"
    if outcome.collected is not None and outcome.collected.files:
        versions = len(outcome.collected.versions)
        text += f"; collected {versions} old versions, {outcome.collected.files} files"
    return text


def _short(value: Any) -> str:
    return f"{value[:8]}…" if isinstance(value, str) and len(value) > 16 else repr(value)


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("pairs"))
