"""Stations 5-7 as a Ray Train job: pairs and prompts in, student and fake score out.

The run's state is its networks, optimizers, `Progress`, the segments of the pairs it follows and
its record of rollbacks alone: every random number and every batch is a function of these and of
the run's seed, on any number of workers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ray
import ray.train

from dmd_core.checkpoint import CheckpointError
from dmd_core.health import DivergedError, Tally
from dmd_core.networks import DmdNetworks
from dmd_core.parallel import World
from dmd_core.trainer import DmdTrainer
from pipelines.beside import Beside
from pipelines.beside_task import EvaluationTask
from pipelines.fence import Fence
from pipelines.health_record import HealthRecordError, Remedies
from pipelines.health_rules import derived
from pipelines.health_watch import HealthWatch, StoppedError
from pipelines.lease import LeaseLostError, LeaseNotSeenError
from pipelines.log_window import LogWindow
from pipelines.preemption import PreemptionWatch
from pipelines.prefetch import Prefetcher
from pipelines.progress import Throttle
from pipelines.run_checkpoints import RunCheckpoints
from pipelines.run_end import ENDED_EARLY, early_end, is_finished
from pipelines.run_inputs import RunInputs
from pipelines.run_log import RunLog
from pipelines.stage_settings import StageKeys
from pipelines.step_data import Progress
from pipelines.train_settings import lr_factor, stage_settings, trainer_settings
from pipelines.workers import Group

# A restart of the workers would end in the same way.
_FINAL = (CheckpointError, DivergedError, HealthRecordError, LeaseLostError, StoppedError)


def train_loop(config: dict[str, Any]) -> None:
    """One worker of `dmd train`. `config`: train, pairs, seed, dir, storage, teacher, root, pins,
    pin (a `PinHolder`), evaluation (an `EvaluationTask`), fence (of the run's lease), board. An
    error that a restart cannot mend is handed to the board, and the loop returns."""
    board = config.get("board")
    try:
        _DmdRun(config).run()
    except _FINAL as error:
        if board is None:
            raise
        ray.get(board.fail.remote(error))


class _DmdRun:
    def __init__(self, config: dict[str, Any]) -> None:
        self.group, self.board = Group.here(), config.get("board")
        self.group.prepare_computing(config["train"]["threads_per_worker"])
        self.inputs = RunInputs(config, self.group)
        self.section, self.store = self.inputs.section, self.inputs.store
        self.fence = Fence(self.store, config["fence"])
        self.versions, self.pins = self.inputs.versions, self.inputs.pins
        self.teacher = self.inputs.teacher
        self.networks = DmdNetworks(
            self.teacher,
            trainer_settings(self.section, self.inputs.seed),
            World(self.group.rank, self.group.size, self.teacher.device),
            self.inputs.shape,
        )
        self.trainer = DmdTrainer(self.networks, self.inputs.unconditional())
        source = self.inputs.source(timesteps=len(self.networks.timesteps))
        self.data = Prefetcher(source)
        self.follower = self.inputs.follower(config.get("pin"))
        self.plan, self.lr_factor = self.section.plan(), lr_factor(self.section)
        task = config.get("evaluation")
        self.beside = Beside(
            EvaluationTask(**task) if task else None,
            self.store, rank=self.group.rank, share=self.group.share,
        )  # fmt: skip
        self.health = HealthWatch(
            self.section.health, self.store, self.group, self.versions.statistics()
        )
        self.checkpoints = RunCheckpoints(
            self.store, self.networks, self.group,
            keep=self.section.checkpoints_total_limit, also=self._kept_checkpoints,
        )  # fmt: skip
        self.progress, self.finished = Progress(), False
        self.ended_early: dict[str, Any] | None = None
        self.preemption = PreemptionWatch()

    # ------------------------------------------------------------------ the loop

    def run(self) -> None:
        self._begin()
        try:
            while not self.finished:
                self._run_stage()
            self.beside.advance()
        except (DivergedError, StoppedError):  # on every worker at once
            self.checkpoints.close()  # a save that is under way is worth its wait
            raise
        finally:
            self.data.close()
            self.log.close()
        self.checkpoints.close()
        ray.train.report({"step": self.progress.step})

    def _begin(self) -> None:
        """Go on from the newest checkpoint that may be believed, or from the start."""
        self._check_folder()
        self._check_lease()
        step = self.checkpoints.newest(self.health.read())
        if step is not None:
            self._restore(step)
        self.log = RunLog(
            self.store, self.group, self.fence, self.section.report_to, self.progress.step,
            settings={
                "seed": self.inputs.seed,
                "teacher": self.teacher.revision,
                "pairs": self.pins.digest,
                "train": self.section.model_dump(mode="json"),
            },
        )  # fmt: skip
        self.health.replay(self.log.lines)
        self.beside.resume(self.progress.step, finished=self.finished)
        if self._samples_here:
            self.inputs.sample_pictures.prepare()
        if self.progress.step == 0:
            self._show_samples()
            if self.section.health.rolls_back:  # there must be a state to go back to
                self._save()

    def _run_stage(self) -> None:
        """To the end of the current stage; its last step is logged, sampled and saved. What is
        saved there stands at the start of the next stage: how a stage ended is not asked again.
        A rollback ends it early, perhaps in an earlier stage."""
        section, last = self.section, self.progress.stage == len(self.plan) - 1
        stage, keys = self.plan[self.progress.stage]
        keys = _remedied(keys, self.health.remedies)
        self.trainer.enter_stage(stage_settings(section, keys, self.inputs.distance(keys)))
        board_throttle = Throttle(0.5)
        window = LogWindow(self.trainer.nonfinite_updates)
        over = self.progress.stage_is_over(stage, keys, None)  # the stage, or all
        while not over:
            data = self.data.draw(self.progress, keys, self.versions.stream(keys))
            try:
                tally = self.trainer.step(data, self.lr_factor(self.progress.step))
            except DivergedError:  # on every worker at once: a rule may know what to do
                if window.steps and self._ails(self._logged(window, keys)):
                    return
                raise
            window.add(tally)
            before, self.progress = self.progress, self.progress.after_step(keys)
            step = self.progress.step
            over = ended = self.progress.stage_is_over(stage, keys, None)
            if self.board is not None and self.group.rank == 0 and (board_throttle.ready() or over):
                self.board.set.remote(done=step, **self._shown(tally, stage.name))
            if step % section.logging_steps == 0 or over:
                metrics = self._logged(window, keys)
                window = LogWindow(self.trainer.nonfinite_updates)
                if self._ails(metrics):
                    return
                ended = self.progress.stage_is_over(stage, keys, metrics)
                over = ended or self._to_end()
            self.finished = over and (last or self.beside.stop())
            if ended and not last:  # also where patience ends the run: it may go on with more
                self.progress = self.progress.next_stage()
            if self.finished and not (ended and last):
                self.ended_early = early_end(section.evaluation, self.beside.without_gain)
            switched = None if self.finished else self.follower.follow(before, self.progress)
            if switched is not None:
                self.data.forget()
                self._log(switched)
            if step % section.validation_steps == 0 or over:
                self._show_samples()
            if step % section.checkpointing_steps == 0 or over or self.preemption.calls(step):
                self._save()
        self.finished = last or self.finished  # also where there was nothing left to do

    def _to_end(self) -> bool:
        """Do the evaluations beside the training say that it is enough?"""
        for found in self.beside.advance().results:
            shown = {f"validation/{name}": value for name, value in found.values().items()}
            self.log.scalars(found.step, shown)
        return self.beside.stop()

    # ------------------------------------------------------------------ what it says

    def _logged(self, window: LogWindow, keys: StageKeys) -> dict[str, float]:
        metrics = self._measure(window, keys)
        self._log(metrics)
        return metrics

    def _measure(self, window: LogWindow, keys: StageKeys) -> dict[str, float]:
        found = window.measured(self.group, self.networks.world.device)
        self.preemption.pace(found.step_s)
        metrics = found.means | {
            "samples_per_second": keys.train_batch_size / found.step_s,
            "data_wait": self.data.waited_s / found.elapsed_s,
            "nonfinite_updates": window.nonfinite_updates(self.trainer.nonfinite_updates),
        }
        self.data.waited_s = 0.0
        return metrics | derived(metrics, self.versions.statistics())

    def _log(self, metrics: Mapping[str, float]) -> None:
        names = {"stage": self.progress.stage} if self.section.stages else {}
        self.log.append({"step": self.progress.step, **names, **metrics})

    def _shown(self, tally: Tally, stage: str) -> dict[str, Any]:
        shown: dict[str, Any] = {
            n: v for n, v in tally.means().items() if n.startswith("loss") and "_t" not in n
        }
        if self.versions.segments:
            shown["pairs"] = f"pairs v{self.versions.segments[-1].version}"
        return shown | ({"stage": stage} if self.section.stages else {})

    @property
    def _samples_here(self) -> bool:
        """Sharded networks are called by all workers together."""
        return self.group.rank == 0 or self.networks.sharded

    def _show_samples(self) -> None:
        """Of teacher and student, on the same noise."""
        if self._samples_here:
            with self.networks.averaged() as student:
                rows = self.inputs.sample_pictures.rows(student)
            self.log.pictures(self.progress.step, rows, surely=self.finished)

    # ------------------------------------------------------------------ health

    def _ails(self, metrics: Mapping[str, float]) -> bool:
        """Ask the rules of a line. True: the run has gone back to an earlier state."""
        verdict = self.health.look(self.progress.step, metrics)
        if verdict is None:
            return False
        self._check_lease()
        self.log.flush()  # what led to it can be seen, whatever follows
        goal = self.checkpoints.goal(verdict) if verdict.action == "rollback" else None
        self.health.record(verdict, to_step=goal)
        if goal is None:
            return False
        self.data.forget()
        self.checkpoints.drop_after(goal)
        self._restore(goal)
        self.log.rewind(goal)
        self.health.replay(self.log.lines)
        self.beside.resume(goal)
        self.log.flush()
        return True

    def _kept_checkpoints(self, committed: Sequence[int]) -> Collection[int]:
        return {*self.beside.kept(), *self.health.needed(committed)}

    # ------------------------------------------------------------------ state

    def _check_folder(self) -> None:
        """Each worker looks: else one that sees another folder is noticed at the first save."""
        blind = self.group.count(not self.fence.is_seen(), self.networks.world.device)
        if blind:
            raise LeaseNotSeenError(
                f"{blind} of {self.group.size} workers do not see the run's lease in "
                f"{self.store.url}; is this the same folder on every node? A training on several "
                "machines needs a shared one, or s3://…"
            )

    def _check_lease(self) -> None:
        """Who started this training may be frozen or cut off, and another one at work here."""
        self.group.first(self.fence.check)

    def _save(self) -> None:
        self._check_lease()
        self.log.flush(surely=self.finished)
        step = self.progress.step
        state = {
            "pairs_digest": self.pins.digest,
            "pairs_segments": self.versions.state(),
            "teacher_revision": self.teacher.revision,
            "progress": asdict(self.progress),
            "finished": self.finished,
            ENDED_EARLY: self.ended_early,
            "total_steps": self.section.total_steps,
            "nonfinite_updates": self.trainer.nonfinite_updates,
            "rollbacks": self.health.rollbacks,
        }
        self.checkpoints.save(step, state, surely=self.finished)
        self.beside.saving(step, finished=self.finished)

    def _restore(self, step: int) -> None:
        state = self.checkpoints.restore(step)
        for key, ours in (
            ("pairs_digest", self.pins.digest),
            ("teacher_revision", self.teacher.revision),
        ):
            if state[key] != ours:
                raise CheckpointError(
                    f"checkpoint of step {step} in {self.store.url} has {key} "
                    f"{state[key][:12]}…, expected {ours[:12]}…; use another run.dir"
                )
        self.trainer.resume(state["nonfinite_updates"])
        self.progress = Progress(**state["progress"])
        self.versions.restore(state["pairs_segments"])
        self.finished = is_finished(state, self.section)


def _remedied(keys: StageKeys, change: Remedies) -> StageKeys:
    """A stage's settings after the rollbacks so far."""
    factor = change.learning_rate_factor
    fake_rate = keys.fake_learning_rate
    return keys.model_copy(
        update={
            "fake_updates": change.fake_updates(keys.fake_updates),
            "learning_rate": keys.learning_rate * factor,
            "fake_learning_rate": None if fake_rate is None else fake_rate * factor,
        }
    )
