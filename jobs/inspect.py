"""`dmd inspect`: what a pair data set holds, is it whole, and what changed between versions."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from jobs.errors import Exit, JobError
from jobs.inspect_show import (
    COST_NOTE,
    fingerprint_lines,
    generations_table,
    lease_line,
    listed,
    sampler_in_words,
    shortened,
    version_lines,
    versions_table,
)
from jobs.session import Session
from pipelines.dataset_pins import read_pins, unpin
from pipelines.inspection import inspect_dataset
from pipelines.manifest import latest_manifest, load_manifest
from pipelines.manifest_model import Manifest
from pipelines.storage import Store, open_store

_ROWS = 16
_NAMED_IDS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dmd inspect` takes beside the common options."""
    parser.add_argument(
        "dataset", nargs="?", help="folder or s3:// URL; without it: the recipe's pairs"
    )
    parser.add_argument("--version", type=_positive, metavar="N", help="default: the newest one")
    for name, what in (
        ("sample", "write a picture of K random pairs"),
        ("verify", "make K random rows again and compare them with what is stored"),
    ):
        text = f"{what} (default {_ROWS}); needs the teacher"
        parser.add_argument(
            f"--{name}", nargs="?", const=_ROWS, type=_positive, metavar="K", help=text
        )
    parser.add_argument("--out", metavar="PNG", help="of --sample; default: <data set>-v<N>.png")
    parser.add_argument(
        "--seed", type=_not_negative, default=0, help="draws the random rows; default 0"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="of --verify, in standard deviations of the latents; default: by compute_dtype",
    )
    parser.add_argument(
        "--checksums", action="store_true", help="read every file of the version and check it"
    )
    parser.add_argument(
        "--diff", nargs=2, type=_positive, metavar=("A", "B"), help="what changed from A to B"
    )
    parser.add_argument(
        "--unpin", metavar="NAME", help="give up what a run has pinned, so that it can be collected"
    )


def run(session: Session) -> dict[str, Any]:
    """Show what was asked for; raises `JobError` when something is damaged or differs."""
    return _inspect(session, write=True)


def plan(session: Session) -> dict[str, Any]:
    """The same, without writing a picture."""
    return _inspect(session, write=False)


def _inspect(session: Session, *, write: bool) -> dict[str, Any]:
    asked = session.arguments
    root = _root(session)
    if asked.unpin:
        return {"unpinned": _unpin(session, root, asked.unpin, write=write)}
    if asked.diff:
        return {"diff": _diff(session, root, *asked.diff)}
    if not (asked.sample or asked.verify or asked.checksums):
        return _overview(session, root)
    manifest = _manifest(root, asked.version)
    found: dict[str, Any] = {"root": root.url, "version": manifest.version}
    if asked.sample:
        found["sample"] = _sample(session, root, manifest, write=write)
    if asked.checksums:
        _checksums(session, root, manifest, found)
    if asked.verify:
        _verify(session, root, manifest, found)
    return found


def _root(session: Session) -> Store:
    given = session.arguments.dataset
    root = open_store(given, session.recipe.storage) if given else session.pairs_root
    if not root.fs.exists(root.root):
        raise JobError(
            f"{root.url} does not exist; expected a pair data set. Give its folder or s3:// URL, "
            "or make one with `dmd pairs`"
        )
    return root


def _manifest(root: Store, version: int | None) -> Manifest:
    manifest = latest_manifest(root) if version is None else load_manifest(root, version)
    if manifest is None:
        raise JobError(_nothing_sealed(root))
    return manifest


def _nothing_sealed(root: Store) -> str:
    return (
        f"{root.url} holds no sealed version; `dmd pairs` with the data set's recipe makes one "
        "(a run that was stopped goes on where it was)"
    )


def _unpin(session: Session, root: Store, name: str, *, write: bool) -> str:
    pins = read_pins(root)
    if name not in pins:
        known = ", ".join(pins) or "none"
        raise JobError(f"{root.url} has no pin {name!r}; pins: {known}", Exit.USAGE)
    if write:
        unpin(root, name)
        numbers = ", ".join(map(str, pins[name].versions))
        session.display.done(f"unpinned version {numbers}, which {pins[name].holder} had pinned")
    return name


# ---------------------------------------------------------------- overview


def _overview(session: Session, root: Store) -> dict[str, Any]:
    facts = inspect_dataset(root, version=session.arguments.version)
    say, console = session.display.say, session.display.console
    say(facts.url)
    if facts.versions or facts.void:
        console.print(versions_table(facts))
        for number, reason in facts.void.items():
            say(f"version {number}: void, nobody has this number: {reason}")
        for line in fingerprint_lines(facts.versions):
            say(line)
        for version in facts.versions[-1:]:
            for line in version_lines(version):
                say(line)
    if facts.generations:
        console.print(generations_table(facts.generations))
        say(COST_NOTE)
    say(lease_line(facts.lease))
    for pin in facts.pins:
        numbers = ", ".join(map(str, pin.versions))
        say(f"pinned: version {numbers} by {pin.holder}, since {pin.created} ({pin.name})")
    if facts.problems:
        raise JobError(listed(f"{root.url} is damaged", facts.problems), result=facts.as_dict())
    if not facts.versions:
        if not facts.generations:
            raise JobError(_nothing_sealed(root))
        say(_nothing_sealed(root))
    return facts.as_dict()


# ---------------------------------------------------------------- rows and files


def _sample(session: Session, root: Store, manifest: Manifest, *, write: bool) -> dict[str, Any]:
    asked = session.arguments
    name = Path(root.root.rstrip("/")).name
    out = Path(asked.out or f"{name}-v{manifest.version}.png")
    teacher = _teacher(session, manifest)
    from pipelines.sample_sheet import decode_rows, sample_sheet
    from pipelines.stored_rows import random_rows, read_rows

    rows = read_rows(root, manifest, random_rows(manifest, asked.sample, asked.seed))
    found = {"rows": len(rows), "seed": asked.seed, "pair_ids": [row.pair_id for row in rows]}
    if not write:
        return found
    title = f"{name}, version {manifest.version}"
    drawn = f"{len(rows)} of {manifest.rows:,} pairs, drawn with seed {asked.seed}"
    sheet = sample_sheet(
        decode_rows(teacher, rows),
        [row.prompt for row in rows],
        title,
        f"{drawn} · {sampler_in_words(manifest.fingerprint)}",
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(sheet)
    session.display.done(f"sample: {drawn} → {out}")
    return {**found, "picture": str(out)}


def _verify(session: Session, root: Store, manifest: Manifest, found: dict[str, Any]) -> None:
    asked = session.arguments
    teacher = _teacher(session, manifest)
    from pipelines.reintegration import verify_rows

    report = verify_rows(
        root,
        manifest,
        teacher,
        count=asked.verify,
        seed=asked.seed,
        batch_size=session.recipe.pairs.batch_size,
        tolerance=asked.tolerance,
    )
    found["verify"] = asdict(report)
    about = (
        f"{report.rows} rows of version {report.version} (drawn with seed {report.seed}): latents "
        f"differ by {report.max_difference:.2g} at most and {report.mean_difference:.2g} on "
        f"average, in standard deviations ({report.latent_std:.3g}); allowed: {report.tolerance:g} "
        f"and the rounding of {manifest.fingerprint['dtype']}"
    )
    if not report.ok:
        problems = [
            f"{len(ids)} {what}: {', '.join(map(str, ids[:_NAMED_IDS]))}"
            for what, ids in (
                ("ids whose latents differ", report.latents_differ),
                ("ids whose noise is not that of their seed", report.noise_differs),
            )
            if ids
        ]
        raise JobError(listed(f"{root.url}: {about}", problems), result=found)
    session.display.done(f"verify: {about}; the noise is that of the seeds, bit for bit")


def _teacher(session: Session, manifest: Manifest) -> Any:
    """The recipe's teacher, if it is the one that made the version."""
    import torch

    from dmd_core.teacher import load_teacher, teacher_revision
    from pipelines.reintegration import check_revision

    check_revision(manifest, teacher_revision(session.teacher_dir))
    return load_teacher(
        session.teacher_dir,
        device=_device(session),
        compute_dtype=getattr(torch, manifest.fingerprint["compute_dtype"]),
    )


def _device(session: Session) -> str:
    """Where pairs are made, if it is there: other kernels give slightly other latents."""
    import torch

    on_gpu = session.recipe.pairs.gpus_per_actor and torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu"


def _checksums(session: Session, root: Store, manifest: Manifest, found: dict[str, Any]) -> None:
    from pipelines.stored_rows import check_files

    report = check_files(root, manifest)
    if report.problems:
        load_manifest(root, manifest.version)  # says so if it was collected meanwhile
    found["checksums"] = asdict(report)
    about = f"version {report.version}: {report.files} files, {decimal(report.bytes)}"
    if report.problems:
        raise JobError(listed(f"{root.url}, {about}: not as sealed", report.problems), result=found)
    session.display.done(f"checksums: {about}, {report.rows:,} rows: all as sealed")


# ---------------------------------------------------------------- two versions


def _diff(session: Session, root: Store, old: int, new: int) -> dict[str, Any]:
    from pipelines.version_diff import diff_versions

    diff = diff_versions(root, load_manifest(root, old), load_manifest(root, new))
    say = session.display.say
    say(f"{root.url}: version {old} → version {new}")
    say(f"rows: {diff.added:,} added, {diff.removed:,} removed, {diff.kept:,} kept")
    if diff.kept:
        say(f"  kept in the same files: {diff.same_file:,}")
    if diff.compared:
        unlike = ", ".join(f"{name} of {count:,}" for name, count in diff.differing.items())
        say(
            f"  kept in other files: {diff.compared:,}, of which {diff.equal:,} are equal bit for "
            "bit" + (f" (other {unlike})" if unlike else "")
        )
    if not diff.fingerprint:
        say("fingerprint: the same")
    for name, (then, now) in diff.fingerprint.items():
        say(f"fingerprint: {name} {then!r} → {now!r}")
    for what, count, examples in (
        ("added", diff.prompts_added, diff.added_examples),
        ("removed", diff.prompts_removed, diff.removed_examples),
    ):
        say(f"prompts {what}: {count:,}")
        for example in examples:
            say(f"  {shortened(example)}")
    return asdict(diff)


def _positive(text: str) -> int:
    return _whole(text, 1)


def _not_negative(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, {least} or more")
    return int(text)


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("inspect"))
