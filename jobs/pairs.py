"""`dmd pairs`: prompts → teacher on Ray Data → a sealed pair data set (stations 1-4)."""

from typing import Any

from dmd_core.teacher import teacher_revision
from jobs.config import resolve_shipped
from jobs.errors import Exit, JobError
from jobs.session import Session
from pipelines.config import PairsSection
from pipelines.manifest import Manifest, find_sealed
from pipelines.pairs import fingerprint_of
from pipelines.prompts import LandedPrompts, land_prompts
from pipelines.storage import check_writable


def run(session: Session) -> dict[str, Any]:
    """Land the prompts, make the missing pairs, seal; returns the summary."""
    section = session.recipe.pairs
    revision = teacher_revision(session.teacher_dir)
    session.open_run()
    check_writable(session.pairs_root)
    prompts = _land(session)
    fingerprint = fingerprint_of(section, revision)
    sealed = find_sealed(session.pairs_root, fingerprint.digest, prompts.digest)
    if sealed is not None:
        session.display.done(f"pairs: nothing to do, {_describe(sealed, session)}")
        return _summary(sealed, session, generated=False)
    from pipelines.generate import generate_pairs  # imports Ray: not for "nothing to do"

    with session.watch("pairs", prompts.rows, "pairs") as board:
        manifest = generate_pairs(
            section,
            teacher_url=session.teacher_url,
            storage=session.recipe.storage,
            root=session.pairs_root,
            prompts=prompts,
            fingerprint=fingerprint,
            board=board,
        )
    session.display.done(f"pairs: {_describe(manifest, session)}")
    check_rejects(manifest.rows, manifest.rejected, section.max_rejected_share)
    return _summary(manifest, session, generated=True)


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; measures one teacher evaluation, writes only the landed prompts."""
    section = session.recipe.pairs
    prompts = _land(session)
    seconds, pair_bytes = _measure(session, section)
    return {
        "prompts": section.prompts,
        "rows": prompts.rows,
        "batches": -(-prompts.rows // section.batch_size),
        "blocks": -(-prompts.rows // section.rows_per_block),
        "network_evaluations": prompts.rows * evaluations_per_picture(section),
        "bytes": prompts.rows * pair_bytes,
        "estimated_seconds": round(prompts.rows * seconds / section.actors),
        "writes_to": session.pairs_root.url,
    }


def evaluations_per_picture(section: PairsSection) -> int:
    """UNet evaluations of one sample: guidance doubles them."""
    return section.steps * (2 if section.guidance_scale > 1 else 1)


def check_rejects(rows: int, rejected: int, allowed: float) -> None:
    """Raise `JobError` with exit code 5 when more than the `allowed` share was rejected."""
    share = rejected / max(1, rows + rejected)
    if share > allowed:
        raise JobError(
            f"the version is sealed, but {rejected} of {rows + rejected} rows were rejected "
            f"({share:.1%}; pairs.max_rejected_share allows {allowed:.1%}). The reasons are in the "
            "generation's rejects/ folder; the same command tries those rows again.",
            Exit.REJECTS,
        )


def _land(session: Session) -> LandedPrompts:
    section = session.recipe.pairs
    return land_prompts(
        resolve_shipped(section.prompts),
        session.recipe.storage,
        session.pairs_root,
        seed=section.seed,
        samples_per_prompt=section.samples_per_prompt,
    )


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


def _describe(manifest: Manifest, session: Session) -> str:
    rejected = f", {manifest.rejected} rejected" if manifest.rejected else ""
    return (
        f"{manifest.rows} pairs{rejected} in {session.pairs_root.url} (version {manifest.version})"
    )


def _summary(manifest: Manifest, session: Session, *, generated: bool) -> dict[str, Any]:
    return {
        "root": session.pairs_root.url,
        "version": manifest.version,
        "digest": manifest.digest,
        "rows": manifest.rows,
        "rejected": manifest.rejected,
        "generated": generated,
    }


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("pairs"))
