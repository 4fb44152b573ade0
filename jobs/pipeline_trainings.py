"""Each training of a chain has a folder of its own, named for what goes into it.

`<run.dir>/trainings/<digest>/` is a run folder as `dmd train` makes it. The same inputs find the
same folder again, so a killed training goes on and a finished one is not done twice; other inputs
(grown pairs, another learning rate, another teacher) make another training, and the one before it
stays as it was. A training that is to be done once more gets `<digest>-2`, and so on. One that
`dmd train` made from the same inputs in the run folder itself is taken as it is.

A folder is named for the versions of the pairs that its training begins with. Until it has a
checkpoint it reads those or nothing. After that it reads what it has pinned, so it is also found
for another version that holds the same rows, and may follow to newer ones.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import yaml
from pydantic import ValidationError

from dmd_core.checkpoint import committed_steps, read_state
from jobs.config import Recipe
from jobs.pins import PINNED, run_pins
from jobs.run_settings import MAY_CHANGE, flat_settings, is_one_of
from jobs.session import Session
from pipelines.chain import read_record
from pipelines.config import Section
from pipelines.manifest import NoSuchVersionError, load_manifest
from pipelines.manifest_model import canonical_digest
from pipelines.pins import Pins
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import Store, check_writable

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
        return dict(_version(v) for k, v in self.inputs.items() if k.split()[0] == _PAIRS)

    def store(self, session: Session) -> Store:
        """Its own run folder, in that of the chain's `session`."""
        return session.store.at(self.folder) if self.folder else session.store


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
    if newest and (_is_of(session, newest, inputs) or _follows(session, newest, inputs)):
        return newest
    name = _name(inputs)
    attempts = _attempts(session, name)
    if attempts:
        return Training(attempts[-1], inputs)
    others = (*_trained_here(session), *_all_begun(session))
    found = (training for training in others if _is_of(session, training, inputs))
    return next(found, Training(name, inputs))


def another_attempt(session: Session, inputs: Mapping[str, Any]) -> Training:
    """A training of these inputs in a new folder."""
    name = _name(inputs)
    attempts = _attempts(session, name)
    if not attempts:
        return Training(name, inputs)
    return Training(f"{name}-{int(attempts[-1].partition('-')[2] or 1) + 1}", inputs)


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


def _all_begun(session: Session) -> Iterator[Training]:
    """The newest first."""
    read = {name: session.read_json(f"{FOLDER}/{name}/{BEGUN}") for name in _folders(session)}
    begun = {name: content for name, content in read.items() if content is not None}
    for name in sorted(begun, key=lambda name: begun[name]["begun"], reverse=True):
        yield Training(name, begun[name]["inputs"])


def _trained_here(session: Session) -> Iterator[Training]:
    """What `dmd train` (or `dmd demo`) has made in the run folder itself, if it has."""
    store, kept = session.store, session.read_json(PINNED)
    path, state = store.path("config.yaml"), _last_state(store)
    if kept is None or state is None or not store.fs.exists(path):
        return
    try:
        then = Recipe.model_validate(yaml.safe_load(store.fs.cat_file(path)))
    except (yaml.YAMLError, ValidationError):
        return  # of another release: whatever it was, it is not this
    yield Training("", _inputs(then, Pins.from_json(kept), state["teacher_revision"]))


def _is_of(session: Session, training: Training, inputs: Mapping[str, Any]) -> bool:
    """Is it a training of these inputs? Also one that reads the same rows from another version: as
    they were sealed when it began or, with `train.follow_pairs`, those that it read last."""
    if training.inputs == inputs:
        return True
    state = _begun_apart_from_pairs(session, training, inputs)
    if state is None:
        return False
    last = state["pairs_segments"][-1]
    reads = (last["version"], last["digest"])
    if session.recipe.train.follow_pairs == "no":
        reads = _version(training.inputs[_PAIRS])
    return _same_rows(session.pairs_root, reads, _version(inputs[_PAIRS]))


def _follows(session: Session, training: Training, inputs: Mapping[str, Any]) -> bool:
    """With `train.follow_pairs` a training that is not finished takes up new versions itself."""
    if session.recipe.train.follow_pairs == "no":
        return False
    if read_record(training.store(session), "train") is not None:
        return False
    return _begun_apart_from_pairs(session, training, inputs) is not None


def _begun_apart_from_pairs(
    session: Session, training: Training, inputs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The last checkpoint's state, if there is one and the training is one of these inputs but for
    the pairs. Without a checkpoint, `dmd train` would begin it with the newest version."""
    if _but_pairs(training.inputs) != _but_pairs(inputs):
        return None
    return _last_state(training.store(session))


def _same_rows(root: Store, then: tuple[int, str], now: tuple[int, str]) -> bool:
    """Do two versions (number, digest) hold the same rows of the same files? The first one may be
    gone, or another one by now: then nobody can say, nor go on reading it."""
    if then == now:
        return True
    try:
        before, after = load_manifest(root, then[0]), load_manifest(root, now[0])
    except NoSuchVersionError:
        return False
    if before.digest != then[1]:
        return False
    return (before.fingerprint_digest, before.files) == (after.fingerprint_digest, after.files)


def _last_state(store: Store) -> dict[str, Any] | None:
    """Of the newest checkpoint in a run folder."""
    steps = committed_steps(store.fs, store.path(CHECKPOINTS))
    return read_state(store.fs, store.path(CHECKPOINTS), steps[-1]) if steps else None


def _version(text: str) -> tuple[int, str]:
    """ "version 3 <digest>", as inputs name it."""
    _, number, digest = text.split()
    return int(number), digest


def _name(inputs: Mapping[str, Any]) -> str:
    return canonical_digest(inputs)[:_DIGITS]


def _but_pairs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key.split()[0] != _PAIRS}


def _attempts(session: Session, name: str) -> list[str]:
    """The folders of one digest, oldest first."""
    pattern = re.compile(rf"{name}(?:-(\d+))?")
    matches = filter(None, map(pattern.fullmatch, _folders(session)))
    return [match[0] for match in sorted(matches, key=lambda match: int(match[1] or 1))]


def _folders(session: Session) -> list[str]:
    store, folder = session.store, session.store.path(FOLDER)
    if not store.fs.exists(folder):
        return []
    return [path.rstrip("/").rsplit("/", 1)[-1] for path in store.fs.ls(folder, detail=False)]


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

    def check_run(self) -> None:
        """Wherever the run, its teacher and its pairs lie now: what they are is in the training's
        name, and in what it has pinned."""
        check_writable(self.store)
        self.check_settings()

    @cached_property
    def teacher_dir(self) -> str:
        return self._chain.teacher_dir

    def start_ray(self) -> None:
        self._chain.start_ray()
