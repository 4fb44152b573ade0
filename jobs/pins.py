"""What a training run reads is fixed when it starts: versions of the pairs, prompts, pictures.

Kept in `pins.json` of the run's folder, so that the same command reads the same data again.
"""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from jobs.config import resolve_shipped
from jobs.errors import Exit, JobError
from jobs.session import Session
from pipelines.manifest import Manifest, latest_manifest, load_manifest
from pipelines.pins import Pins
from pipelines.prompts import read_prompts
from pipelines.streams import open_pictures, pictures_digest

PINNED = "pins.json"


def run_pins(session: Session, *, started: bool) -> Pins:
    """What the run reads. A run that has `started` (has a checkpoint) reads what it read then,
    or is refused; any other reads what is newest now."""
    kept = session.read_json(PINNED)
    if kept is None or not started:
        return _observe(session, _default_version(session))
    pins = Pins.from_json(kept)
    now = _observe(session, pins.default)
    for name in ("versions", "prompts_digest", "pictures_digest"):
        then, found = getattr(pins, name), getattr(now, name)
        if then != found:
            raise JobError(
                f"{name.replace('_', ' ')} of this run are not those it was started with "
                f"({session.store.url}/{PINNED}: {_short(then)}, now {_short(found)}); put them "
                "back, or use another run.dir",
                Exit.REFUSED,
            )
    return now  # the same content; a shipped file may lie elsewhere now


def save_pins(session: Session, pins: Pins) -> None:
    session.write_json(PINNED, asdict(pins))


def pinned_manifest(session: Session) -> Manifest | None:
    """The version of the pairs that the run reads by default; None: it reads no pairs."""
    kept = session.read_json(PINNED)
    if kept is None:
        raise JobError(
            f"{session.store.url} has no {PINNED}; run `dmd train` with this recipe first"
        )
    pins = Pins.from_json(kept)
    if pins.default is None:
        return None
    manifest = load_manifest(session.pairs_root, pins.default)
    if manifest.digest != pins.digest:
        raise JobError(
            f"{session.pairs_root.url} version {pins.default} has digest {manifest.digest[:12]}…, "
            f"this run was trained on {pins.digest[:12]}…",
            Exit.REFUSED,
        )
    return manifest


def _default_version(session: Session) -> int | None:
    """The version of stages that need pairs and name none: the newest one. Where every such stage
    names its own, the first of these; None: no stage needs pairs, as in DMD2."""
    asked = [keys.pairs_version for _, keys in session.recipe.train.plan() if keys.needs_pairs]
    if not asked:
        return None
    if None not in asked:
        return asked[0]
    manifest = latest_manifest(session.pairs_root)
    if manifest is None:
        raise JobError(
            f"{session.pairs_root.url} has no sealed pairs; run `dmd pairs` with this recipe first"
        )
    return manifest.version


def _observe(session: Session, default: int | None) -> Pins:
    """Pins of what is there now, with `default` as the version of stages that name none."""
    section, root = session.recipe.train, session.pairs_root
    asked = {keys.pairs_version for _, keys in section.plan() if keys.needs_pairs}
    versions = {v for v in asked | {default} if v is not None}
    prompts = section.unpaired_prompts or ("" if default else session.recipe.pairs.prompts)
    prompts = resolve_shipped(prompts)
    return Pins(
        default=default,
        versions={v: load_manifest(root, v).digest for v in sorted(versions)},
        prompts=prompts,
        prompts_digest=_prompts_digest(session, prompts),
        pictures_digest=_pictures_digest(session),
    )


def _prompts_digest(session: Session, source: str) -> str:
    if not source:
        return ""
    prompts = read_prompts(source, session.recipe.storage).prompts
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def _pictures_digest(session: Session) -> str:
    section = session.recipe.train
    if not section.uses_gan:
        return ""
    _, refs = open_pictures(section.real_pictures, session.recipe.storage)
    return pictures_digest(refs)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"version {v} {digest[:12]}…" for v, digest in value.items()) or "none"
    return f"{value[:12]}…" if value else "none"
