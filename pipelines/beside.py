"""Evaluation beside the training, on Ray Train's asynchronous validation.

The loop reports a pointer to one of our checkpoints; Ray Train runs `validate` for it, one at a
time, whenever there are resources to spare, and waits for the last one before `fit` returns. What
came of it is read from files, so nothing here depends on Ray Train's own snapshot.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError, TaskCancelledError
from ray.train import ValidationConfig, ValidationTaskConfig

from dmd_core.checkpoint import committed_steps
from dmd_core.files import store_errors
from pipelines.beside_results import (
    Evaluated,
    drop_results_after,
    kept_steps,
    pending_evaluations,
    read_results,
    update_best,
    waiting_steps,
    without_gain,
    write_result,
)
from pipelines.beside_settings import EvaluationSection
from pipelines.beside_task import EvaluationTask, evaluate_checkpoint
from pipelines.config import EvaluateSection
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import Store
from pipelines.student_export import checkpoint_digest
from pipelines.workers import last_line

POINTER = "pointer.json"
_ATTEMPTS = 2
_GONE = "its checkpoint is gone"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class News:
    """What has come of evaluations since the last time; the same on every worker."""

    results: tuple[Evaluated, ...] = ()
    stop: bool = False


@dataclass(frozen=True)
class _Decision:
    """Of rank 0. `ready`: to be reported now; `lost`: will have no result; `done`: have one;
    `without_gain`: so many evaluations since the best one."""

    ready: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    done: tuple[Evaluated, ...] = ()
    without_gain: int = 0


class Beside:
    """The training loop's side. `resume`, `saving` and `advance` are called by every worker at the
    same points of the loop, for a report to Ray Train is a barrier; `kept` on rank 0 alone.

    `share(value)` returns rank 0's value on every worker. `task` None: nothing is evaluated.
    """

    def __init__(
        self,
        task: EvaluationTask | None,
        store: Store,
        *,
        rank: int,
        share: Callable[[Any], Any],
    ) -> None:
        self._section = EvaluationSection() if task is None else task.settings
        self._inputs = "" if task is None else task.inputs
        self._store, self._rank, self._share = store, rank, share
        self._begun: list[int] = []  # saved, or being saved; not reported yet
        self._running: list[int] = []  # reported, without a result yet
        self._known: list[Evaluated] = []  # on rank 0: read already
        self.without_gain = 0  # so many evaluations since the best one; the same on every worker

    def wanted(self, step: int, *, finished: bool = False) -> bool:
        """Is the checkpoint of this step to be evaluated? `finished`: it ends the run."""
        return bool(waiting_steps([step], [], self._section, finished=finished))

    def resume(self, step: int, *, finished: bool = False) -> None:
        """The training starts from `step`: results after it are forgotten, evaluations that were
        cut short are due again. `finished`: there was nothing left to train."""
        if not self._section.steps:
            return
        found = self._resumed(step, finished) if self._rank == 0 else None
        self._begun, self.without_gain = self._share(found)
        self._running = []

    def saving(self, step: int, *, finished: bool = False) -> None:
        """A save of this step was begun, so those before it are over, for better or worse."""
        if self.wanted(step, finished=finished) and step not in self._begun:
            self._begun.append(step)

    def advance(self) -> News:
        """Report checkpoints whose marker has appeared, and hear of evaluations that have ended.

        Costs nothing when none is outstanding.
        """
        if not self._begun and not self._running:
            return News(stop=self.stop())
        decision: _Decision = self._share(self._decide() if self._rank == 0 else None)
        for step in decision.ready:
            self._report(step)
        over = {*decision.lost, *(result.step for result in decision.done)}
        begun = {*decision.ready, *over}
        self._running = [s for s in (*self._running, *decision.ready) if s not in over]
        self._begun = [step for step in self._begun if step not in begun]
        self.without_gain = decision.without_gain
        return News(decision.done, self.stop())

    def stop(self) -> bool:
        """Should the training end, by `patience`? The same on every worker."""
        patience = self._section.patience
        return patience is not None and self.without_gain >= patience

    def results(self) -> list[Evaluated]:
        return read_results(self._store, self._inputs)

    def kept(self) -> list[int]:
        """Steps that pruning must leave alone. Reads files only: any thread may ask."""
        if not self._section.steps:
            return []
        committed = committed_steps(self._store.fs, self._store.path(CHECKPOINTS))
        results = self.results()
        waiting = waiting_steps(committed, results, self._section)
        return kept_steps(results, waiting, self._section)

    # ------------------------------------------------------------------ on rank 0

    def _resumed(self, step: int, finished: bool) -> tuple[list[int], int]:
        store, section, inputs = self._store, self._section, self._inputs
        drop_results_after(store, step)
        self._known = []
        update_best(store, section, inputs)
        committed = committed_steps(store.fs, store.path(CHECKPOINTS))
        until = [found for found in committed if found <= step]
        due = pending_evaluations(store, until, section, inputs, finished=finished)
        return due, without_gain(self.results(), section.metric)

    def _decide(self) -> _Decision:
        """A store that does not answer is asked again the next time."""
        store, section = self._store, self._section
        try:
            committed = committed_steps(store.fs, store.path(CHECKPOINTS))
            self._known = read_results(store, self._inputs, self._known)
        except store_errors() as error:
            _logger.warning("evaluation beside the training: %s", error)
            return _Decision(without_gain=self.without_gain)
        done = tuple(found for found in self._known if found.step in self._running)
        for found in done:
            if found.error:
                _logger.warning("checkpoint %d was not evaluated: %s", found.step, found.error)
        over = {found.step for found in done}
        return _Decision(
            tuple(step for step in self._begun if step in committed),
            tuple(
                step
                for step in (*self._begun[:-1], *self._running)
                if step not in committed and step not in over
            ),
            done,
            without_gain(self._known, section.metric),
        )

    def _report(self, step: int) -> None:
        if self._rank != 0:
            ray.train.report({"step": step})
            return
        with tempfile.TemporaryDirectory(prefix="dmd-pointer-") as folder:
            pointer = {"step": step, "checkpoint": f"{self._store.url}/{CHECKPOINTS}"}
            (Path(folder) / POINTER).write_text(json.dumps(pointer))
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                validation=ValidationTaskConfig(fn_kwargs={"step": step}),
            )


# ---------------------------------------------------------------------- Ray Train's side


def validation_config(task: EvaluationTask | None) -> ValidationConfig | None:
    """For the trainer. Ray Train's own task holds no resources: it only waits for the one that
    does the work. A worker of *its* task that crashed would end the whole training."""
    if task is None:
        return None
    return ValidationConfig(
        fn=validate,
        task_config=ValidationTaskConfig(fn_kwargs={"task": asdict(task)}),
        ray_remote_kwargs={"num_cpus": 0},
    )


def validate(checkpoint: ray.train.Checkpoint, **kwargs: Any) -> dict[str, float]:
    """What Ray Train calls with `step` and `task`; returns the metrics' values."""
    return evaluate_once(EvaluationTask(**kwargs["task"]), kwargs["step"]).values()


def evaluate_once(task: EvaluationTask, step: int) -> Evaluated:
    """Evaluate our checkpoint `step`, unless it has a result, and bring `best.json` up to date. A
    failure is a result too. Nothing is written for a checkpoint that is gone, or another one by
    then, as after a rollback."""
    store, section = task.store(), task.settings
    mark = _mark(store, step)
    for known in read_results(store, task.inputs):
        if known.step == step and known.provenance.get("checkpoint") == mark:
            return known
    result = Evaluated(step, error=_GONE) if mark is None else _evaluated(task, step)
    if mark is None or _mark(store, step) != mark:
        return replace(result, metrics={}, error=_GONE)
    result = replace(result, provenance={**result.provenance, "checkpoint": mark})
    write_result(store, result)
    update_best(store, section, task.inputs)
    return result


def finish_evaluations(task: EvaluationTask, steps: Iterable[int]) -> dict[str, Any] | None:
    """Evaluate without a training: what a run that has ended still owes. Ray must be initialised.
    Returns `best.json`, brought up to date."""
    for step in steps:
        evaluate_once(task, step)
    return update_best(task.store(), task.settings, task.inputs)


def _evaluated(task: EvaluationTask, step: int) -> Evaluated:
    """The evaluation in a process of its own, tried again once."""
    section, reason = task.settings, ""
    where = EvaluateSection.model_validate(task.evaluate).placement.options()
    # One call per process: a finished evaluation gives its memory back, on the device above all.
    remote = ray.remote(
        num_cpus=section.num_cpus, num_gpus=section.num_gpus, max_retries=0, max_calls=1, **where
    )(evaluate_checkpoint)
    for _ in range(_ATTEMPTS):
        try:
            return ray.get(remote.remote(task, step))
        except TaskCancelledError:  # the run is being ended: another one will do it
            raise
        except RayError as error:
            reason = last_line(error)
            _logger.warning("evaluation of checkpoint %d failed: %s", step, reason)
    return Evaluated(step, provenance={"inputs": task.inputs}, error=reason)


def _mark(store: Store, step: int) -> str | None:
    """What tells a checkpoint from another of the same step, in results; None: there is none."""
    try:
        return checkpoint_digest(store, step)[:16]
    except FileNotFoundError:
        return None


def unplaceable(section: EvaluationSection, total: Mapping[str, float]) -> str:
    """Why no evaluation could ever run on a cluster of these resources; "": it can. Training would
    end, and then wait for it without end."""
    for key, name, asked in (
        ("num_cpus", "CPU", section.num_cpus),
        ("num_gpus", "GPU", section.num_gpus),
    ):
        if asked > total.get(name, 0):
            return (
                f"train.evaluation.{key} is {asked:g}, the cluster has {total.get(name, 0):g} "
                f"{name}s; an evaluation would wait for ever"
            )
    return ""
