"""What a training run reads is fixed when it starts: versions of the pairs, prompts, pictures.

Kept in `pins.json` of the run's folder, so that the same command reads the same data again.
"""

import errno
import uuid
from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from jobs.config import resolve_shipped
from jobs.errors import Exit, JobError
from jobs.session import Session
from jobs.teacher_here import pair_source
from pipelines.dataset_pins import pin_name
from pipelines.following import PinHolder
from pipelines.manifest import latest_manifest, load_manifest
from pipelines.manifest_model import Manifest
from pipelines.pins import Pins
from pipelines.prompts import PromptSource, read_prompts
from pipelines.streams import open_pictures, pictures_digest

PINNED = "pins.json"
PIN_NAME = "pin_name.json"
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


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


def pin_in_dataset(session: Session, versions: Iterable[int]) -> PinHolder | None:
    """Keep the versions that the run reads from being collected. The pin outlives the training:
    evaluation and a longer training read them again.

    None: the data set cannot be written to. Raises `ManifestError` for a version that is gone.
    """
    url, root = session.store.url, session.pairs_root
    created = datetime.now(UTC).isoformat(timespec="seconds")
    pin = PinHolder(_pin_name(session), f"dmd train {url}", created)
    try:
        pin.pin(root, versions)
    except OSError as error:
        if not isinstance(error, PermissionError) and error.errno not in _READ_ONLY:
            raise
        session.display.say(
            f"train: {root.url} cannot be written to ({error}); the versions that this run reads "
            "are not pinned, and are gone if somebody collects them"
        )
        return None
    return pin


def _pin_name(session: Session) -> str:
    """The run's name in the data set's pins. Two machines may have the same path: a random part,
    kept with the run, tells them apart."""
    kept = session.read_json(PIN_NAME)
    if kept is None:
        kept = {"name": f"{pin_name(session.store.url)}-{uuid.uuid4().hex[:8]}"}
        session.write_json(PIN_NAME, kept)
    return str(kept["name"])


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
    pins = Pins(
        default=default,
        versions={v: load_manifest(root, v).digest for v in sorted(versions)},
        pictures_digest=_pictures_digest(session),
    )
    source = prompt_source(session, paired=bool(default))
    if source is None:
        return pins
    digest = read_prompts(source, session.recipe.storage).digest
    return replace(pins, prompts=source.files, prompt_column=source.column, prompts_digest=digest)


def prompt_source(session: Session, *, paired: bool) -> PromptSource | None:
    """The prompt files of the DM stream; None: a training that is `paired` takes the prompts of its
    pairs."""
    if session.recipe.train.unpaired_prompts:
        return PromptSource((resolve_shipped(session.recipe.train.unpaired_prompts),))
    return None if paired else pair_source(session.recipe.pairs)


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
