"""When a training is over, by its plan or by patience, and when it goes on after all."""

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from dmd_core.health import Tally
from pipelines.run_end import is_finished, why_early
from pipelines.step_data import Progress
from pipelines.train_config import TrainSection
from pipelines.training import _DmdRun
from pipelines.workers import Group

EVALUATION = {"steps": 2, "patience": 3}
EARLY = {"metric": "kid", "without_gain": 3}


def _section(**changes: Any) -> TrainSection:
    settings = {"lambda_reg": 0, "logging_steps": 1, "checkpointing_steps": 2, "max_train_steps": 8}
    return TrainSection.model_validate(settings | changes)


@pytest.mark.parametrize(
    ("evaluation", "over"),
    [
        (EVALUATION, True),
        ({"patience": 2}, True),
        ({"patience": 4}, False),
        ({"patience": None}, False),
        ({"metric": "rmse"}, False),
        ({"steps": 0}, False),
    ],
)
def test_an_end_by_patience_holds_as_long_as_the_patience_does(evaluation, over):
    state = {"step": 4, "finished": True, "total_steps": 8, "ended_early": EARLY}
    section = _section(evaluation=EVALUATION | evaluation)
    assert is_finished(state, section) is over
    assert is_finished(state | {"total_steps": 6}, section) is over  # the plan did not end it
    assert ("3 evaluations without a better kid" in why_early(state, section)) is over
    assert is_finished(state | {"step": 8}, section)


@pytest.mark.parametrize("early", [{}, {"ended_early": None}])  # as an earlier release wrote it
def test_an_end_by_the_plan_holds_for_this_plan(early):
    state = {"step": 4, "finished": True, "total_steps": 8} | early
    assert is_finished(state, _section()) and why_early(state, _section()) == ""
    assert not is_finished(state, _section(max_train_steps=9))
    assert not is_finished(state | {"finished": False}, _section())
    assert is_finished(state | {"step": 9, "finished": False}, _section())


class _Loop(_DmdRun):
    """The loop alone: nothing is trained, logged or stored. Patience ends it at `stops_at`."""

    def __init__(self, section: TrainSection, stops_at: int, state: dict | None = None) -> None:
        self.section, self.plan, self.group, self.board = section, section.plan(), Group(0, 1), None
        self.health = SimpleNamespace(remedies=SimpleNamespace(
            learning_rate_factor=1.0, fake_updates=lambda count: count
        ))  # fmt: skip
        self.inputs = SimpleNamespace(distance=lambda keys: None)
        self.trainer = SimpleNamespace(
            enter_stage=lambda settings: None,
            step=lambda data, factor: Tally(),
            nonfinite_updates=0,
        )
        self.lr_factor = lambda step: 1.0
        self.data = SimpleNamespace(draw=lambda *given: None)
        self.versions = SimpleNamespace(stream=lambda keys: None)
        self.follower = SimpleNamespace(follow=lambda before, now: None)
        self.beside = SimpleNamespace(
            stop=lambda: self.progress.step >= stops_at,
            without_gain=3,
            advance=lambda: SimpleNamespace(results=()),
        )
        self.preemption = SimpleNamespace(calls=lambda step: False)
        self.progress = Progress(**state["progress"]) if state else Progress()
        self.finished, self.ended_early = bool(state) and is_finished(state, section), None
        self.saved: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        while not self.finished:
            self._run_stage()
        return self.saved

    def _save(self) -> None:
        self.saved = {
            "step": self.progress.step, "progress": asdict(self.progress),
            "finished": self.finished, "total_steps": self.section.total_steps,
            "ended_early": self.ended_early,
        }  # fmt: skip

    def _measure(self, *given: Any) -> dict[str, float]:
        return {}

    def _ails(self, metrics: dict[str, float]) -> bool:
        return False

    _log = _show_samples = lambda self, *given: None


@pytest.mark.parametrize("stops_at", [2, 3, 5])
def test_a_run_that_patience_ended_goes_on_to_the_end_of_its_plan(stops_at):
    """Also where it ended with a stage: the next one begins where it would have begun."""
    stages = [{"steps": 3}, {"steps": 4}]
    given = {"max_train_steps": None, "stages": stages}
    impatient = _section(**given, evaluation=EVALUATION)
    ended = _Loop(impatient, stops_at).run()
    assert ended["step"] == stops_at and ended["finished"] and ended["ended_early"] == EARLY
    assert is_finished(ended, impatient)

    patient = _section(**given, evaluation={"steps": 2})
    done = _Loop(patient, 99, ended).run()
    assert done["step"] == 7 and done["finished"] and done["ended_early"] is None
    assert done["progress"] == _Loop(patient, 99).run()["progress"]


def test_the_end_of_the_plan_is_no_early_end():
    assert _Loop(_section(evaluation=EVALUATION), 8).run()["ended_early"] is None
