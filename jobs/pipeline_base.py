"""What the steps of a chain have in common, and the run that they work on."""

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from types import ModuleType
from typing import Any, ClassVar

from dmd_core.teacher import teacher_revision
from jobs.errors import Exit, JobError
from jobs.pipeline_trainings import (
    FOLDER,
    Training,
    TrainingSession,
    find_training,
    training_inputs,
)
from jobs.session import Session
from pipelines.chain import StepRecord, Verdict, judge, read_record
from pipelines.commits import delete_if_there


class Chain:
    """What the steps work on: the recipe's run folder, and in it the training of its inputs."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @cached_property
    def teacher_revision(self) -> str:
        """sha256 of the teacher's files; they are read once per chain."""
        return teacher_revision(self.session.teacher_dir)

    @cached_property
    def training_inputs(self) -> dict[str, Any]:
        """Of the pairs and settings as they are now: to be asked after the pairs are made."""
        return training_inputs(self.session, self.teacher_revision)

    @cached_property
    def training(self) -> Training:
        """Of these inputs. Its own may name other versions of the pairs: those it began with."""
        return find_training(self.session, self.training_inputs)

    @cached_property
    def run(self) -> TrainingSession:
        """The training's own run folder."""
        return TrainingSession(self.session, self.training)

    @cached_property
    def next_run(self) -> TrainingSession:
        """To plan with, before it is known which training it will be."""
        return TrainingSession(self.session, Training("next", {}))

    def kept(self, name: str) -> dict[str, Any]:
        """A JSON file that a step before left in the training's folder."""
        found = self.run.read_json(name)
        if found is None:
            raise JobError(
                f"{self.run.store.url}/{name} is gone; run the same command again to make it anew",
                Exit.TRANSIENT,
            )
        return found

    def forget_training(self) -> None:
        """Ask again which one it is."""
        for name in ("training_inputs", "training", "run"):
            self.__dict__.pop(name, None)


class Step(ABC):
    """One verb of a chain; `module` is the verb. `marker`: the file that says that its output is
    whole; for others the output itself does."""

    module: ClassVar[ModuleType]
    marker: ClassVar[str] = ""

    @property
    def name(self) -> str:
        return self.module.__name__.rsplit(".", 1)[-1]

    def session(self, chain: Chain) -> Session:
        """Whose folder holds the step's record and its output."""
        return chain.run

    def left_out(self, chain: Chain) -> str:
        """Why this recipe does without the step; "": it does not."""
        return ""

    @abstractmethod
    def inputs(self, chain: Chain) -> dict[str, Any]:
        """What the output follows from: names → settings and digests."""

    @abstractmethod
    def output(self, chain: Chain) -> dict[str, Any] | None:
        """What is there now; None: nothing, or not all of it."""

    def record(self, chain: Chain) -> StepRecord | None:
        return read_record(self.session(chain).store, self.name)

    def verdict(self, chain: Chain) -> Verdict:
        """Skip or run, and why. Reads; writes nothing."""
        why = self.left_out(chain)
        if why:
            return Verdict(False, why)
        found = judge(self.record(chain), self.inputs(chain), self.output(chain))
        return replace(found, why=self.why_new(chain) or found.why) if found.is_new else found

    def is_done(self, chain: Chain) -> bool:
        """Can a later step use what this one left, whether or not it is up to date?"""
        return self.record(chain) is not None and self.output(chain) is not None

    def why_new(self, chain: Chain) -> str:
        """Why there is nothing of this yet, where more can be said than "not done yet"."""
        return ""

    def run(self, chain: Chain) -> None:
        self.module.run(self.session(chain))

    def plan(self, chain: Chain, *, anew: bool) -> dict[str, Any]:
        """The verb's own. `anew`: for a training that has not begun, on pairs that come first."""
        if not anew:
            return self.module.plan(self.session(chain))
        where = f"a new folder in {chain.session.store.at(FOLDER).url}"
        return self.module.plan(chain.next_run) | {"writes_to": where}

    def drop(self, chain: Chain) -> None:
        """Before what is there is replaced: what says that it is whole and up to date goes."""
        if self.marker:
            store = self.session(chain).store
            delete_if_there(store, store.path(self.marker))

    def redo(self, chain: Chain) -> None:
        """To do it afresh, from the beginning."""
        self.drop(chain)
