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


def run_pins(session: Session) -> Pins:
    """The run's pins: those of its start, checked against what is there now; or fresh ones."""
    kept = session.read_json(PINNED)
    if kept is None:
        pins = _fresh(session)
        session.write_json(PINNED, asdict(pins))
        return pins
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
    return pins


def pinned_manifest(session: Session) -> Manifest | None:
    """The version of the pairs that the run reads by default; None: it reads no pairs."""
    pins = run_pins(session)
    return None if pins.default is None else load_manifest(session.pairs_root, pins.default)


def _fresh(session: Session) -> Pins:
    if not session.recipe.train.needs_pairs and not _newest(session):
        return _observe(session, None)  # DMD2 needs no pairs
    manifest = _newest(session)
    if manifest is None:
        raise JobError(
            f"{session.pairs_root.url} has no sealed pairs; run `dmd pairs` with this recipe first"
        )
    return _observe(session, manifest.version)


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


def _newest(session: Session) -> Manifest | None:
    return latest_manifest(session.pairs_root)


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
