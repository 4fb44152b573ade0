"""Each training of a chain has a folder of its own, named for what goes into it.

`<run.dir>/trainings/<digest>/` is a run folder as `dmd train` makes it. The same inputs find the
same folder again, so a killed training goes on and a finished one is not done twice; other inputs
(grown pairs, another learning rate, another teacher) make another training, and the one before it
stays as it was. A training that is to be done once more gets `<digest>-2`, and so on. One that
`dmd train` made from the same inputs in the run folder itself is taken as it is.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import yaml
from pydantic import ValidationError

from dmd_core.checkpoint import committed_steps
from jobs.config import Recipe
from jobs.export import EXPORTED
from jobs.pins import PINNED, run_pins
from jobs.run_settings import MAY_CHANGE, flat_settings, is_one_of
from jobs.session import Session
from pipelines.chain import read_record
from pipelines.config import Section
from pipelines.manifest import NoSuchVersionError, load_manifest
from pipelines.manifest_model import canonical_digest
from pipelines.pins import Pins
from pipelines.run_folder import CHECKPOINTS

FOLDER, BEGUN, NEWEST = "trainings", "training.json", "newest.json"
_DIGITS = 12
# Not what is trained, but where its parts lie. The teacher's and the pairs' digests are inputs.
_PLACES = ("run", "storage", "teacher", "pairs.root")
_PAIRS = "pairs"  # in the names of inputs that follow_pairs lets grow


@dataclass(frozen=True)
class Training:
    """`inputs`: what decides it (names → JSON values). `name` "": it lies in the run folder itself,
    where `dmd train` made it."""

    name: str
    inputs: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Relative to the chain's run folder; "": that folder."""
        return f"{FOLDER}/{self.name}" if self.name else ""

    @property
    def versions(self) -> dict[int, str]:
        """The versions of the pairs that it starts from, and their digests."""
        found = [v.split() for k, v in self.inputs.items() if k.split()[0] == _PAIRS]
        return {int(version): digest for _, version, digest in found}


def training_inputs(session: Session, teacher_revision: str) -> dict[str, Any]:
    """What decides a training that would begin now. Raises `JobError` while pairs are missing."""
    return _inputs(session.recipe, run_pins(session, started=False), teacher_revision)


def _inputs(recipe: Recipe, pins: Pins, teacher_revision: str) -> dict[str, Any]:
    settings = {
        key: value
        for key, value in given_settings(recipe).items()
        if not is_one_of(key, MAY_CHANGE) and not is_one_of(key, _PLACES)
    }
    inputs = settings | {
        "run.seed": recipe.run.seed,
        "teacher": teacher_revision,
        "unpaired prompts": pins.prompts_digest,
        "real pictures": pins.pictures_digest,
    }
    return inputs | {
        _PAIRS if v == pins.default else f"{_PAIRS} of a stage, {v}": f"version {v} {digest}"
        for v, digest in pins.versions.items()
    }


def given_settings(section: Section) -> dict[str, Any]:
    """Every setting that is not its default, flat. A key that a later release adds changes no
    digest of what was done before it."""
    return flat_settings(section.model_dump(mode="json", exclude_defaults=True))


def find_training(session: Session, inputs: Mapping[str, Any]) -> Training:
    """The training of these inputs, begun or not; of several the newest."""
    newest = newest_begun(session)
    if newest is not None and (newest.inputs == inputs or _follows(session, newest, inputs)):
        return newest
    attempts = _attempts(session, _name(inputs))
    if len(attempts) == 1 and _trained_here(session, inputs):
        return Training("", inputs)
    return Training(attempts[-1], inputs)


def another_attempt(session: Session, training: Training) -> Training:
    """The same once more, in a new folder."""
    name = _name(training.inputs)
    if not training.name:
        return Training(name, training.inputs)
    last = _attempts(session, name)[-1]
    return Training(f"{name}-{int(last.partition('-')[2] or 1) + 1}", training.inputs)


def begin(session: Session, training: Training) -> None:
    """Write down what the folder's training is made from, and that it is the newest one."""
    if not training.name:
        return
    known = session.read_json(f"{training.folder}/{BEGUN}")
    if known is None:
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"inputs": dict(training.inputs), "begun": begun}
        session.write_json(f"{training.folder}/{BEGUN}", content)
    if (session.read_json(f"{FOLDER}/{NEWEST}") or {}).get("name") != training.name:
        session.write_json(f"{FOLDER}/{NEWEST}", {"name": training.name})


def newest_begun(session: Session) -> Training | None:
    """The training that was begun, or gone back to, last."""
    pointer = session.read_json(f"{FOLDER}/{NEWEST}")
    if pointer is None:
        return None
    begun = session.read_json(f"{FOLDER}/{pointer['name']}/{BEGUN}")
    return None if begun is None else Training(pointer["name"], begun["inputs"])


def _follows(session: Session, training: Training, inputs: Mapping[str, Any]) -> bool:
    """With `train.follow_pairs` a training takes up new versions itself: while it is not finished,
    and afterwards as long as the version that it read last is the newest."""
    if session.recipe.train.follow_pairs == "no":
        return False
    if _but_pairs(training.inputs) != _but_pairs(inputs):
        return False
    record = read_record(session.store.at(training.folder), "train")
    newest = Training("", inputs).versions
    return record is None or record.output["pairs_digest"] == newest[max(newest)]


def _trained_here(session: Session, inputs: Mapping[str, Any]) -> bool:
    """Has `dmd train` (or `dmd demo`) made this very training in the run folder itself?"""
    store, kept = session.store, session.read_json(PINNED)
    path, steps = store.path("config.yaml"), store.path(CHECKPOINTS)
    if kept is None or not store.fs.exists(path) or not committed_steps(store.fs, steps):
        return False
    try:
        then = Recipe.model_validate(yaml.safe_load(store.fs.cat_file(path)))
    except (yaml.YAMLError, ValidationError):
        return False  # of another release: whatever it was, it is not this
    pins = Pins.from_json(kept)
    return _inputs(then, pins, _teacher_of(session, pins)) == inputs


def _teacher_of(session: Session, pins: Pins) -> str:
    """The digest of the teacher that was trained from; "": nothing there says it."""
    exported = session.read_json(EXPORTED)
    if exported is not None:
        return exported["teacher_revision"]
    if pins.default is None:
        return ""
    try:
        fingerprint = load_manifest(session.pairs_root, pins.default).fingerprint
    except NoSuchVersionError:
        return ""
    return fingerprint["teacher_revision"]


def _name(inputs: Mapping[str, Any]) -> str:
    return canonical_digest(inputs)[:_DIGITS]


def _but_pairs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key.split()[0] != _PAIRS}


def _attempts(session: Session, name: str) -> list[str]:
    """The folders of one digest, oldest first; the first one even if it is not there yet."""
    store, pattern = session.store, re.compile(rf"{name}-(\d+)")
    folder = store.path(FOLDER)
    if not store.fs.exists(folder):
        return [name]
    names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in store.fs.ls(folder, detail=False))
    numbers = sorted(int(match[1]) for entry in names if (match := pattern.fullmatch(entry)))
    return [name, *(f"{name}-{number}" for number in numbers)]


class TrainingSession(Session):
    """A training's folder as the run of its own that the verbs work on; Ray, the display and the
    teacher are the chain's."""

    def __init__(self, chain: Session, training: Training) -> None:
        recipe, title = chain.recipe, chain.store.root.rsplit("/", 1)[-1]
        if training.name:
            title += f", training {training.name}"
            folder = chain.store.at(training.folder).url
            run = recipe.run.model_copy(update={"dir": folder})
            pairs = recipe.pairs.model_copy(update={"root": recipe.pairs_root})
            recipe = recipe.model_copy(update={"run": run, "pairs": pairs})
        asked = argparse.Namespace(title=title, pairs_versions=training.versions)
        super().__init__(recipe, chain.display, asked)
        self._chain = chain

    @cached_property
    def teacher_dir(self) -> str:
        return self._chain.teacher_dir

    def start_ray(self) -> None:
        self._chain.start_ray()
