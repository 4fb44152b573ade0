"""When the workers ask whether a node is to be taken away, and what they answer."""

import pytest
import ray.train

from pipelines.preemption import PreemptionWatch


@pytest.fixture
def notices(monkeypatch):
    """The notice at each question; None: there is none. Counts the questions."""
    said = {"now": None, "asked": 0}

    def told():
        said["asked"] += 1
        return said["now"]

    monkeypatch.setattr(ray.train, "get_preemption_info", told)
    return said


def test_each_notice_is_answered_once(notices):
    watch = PreemptionWatch()
    answers = []
    for step, notices["now"] in enumerate([None, "a", "a", None, "a", "b"], start=1):
        answers.append(watch.calls(step))
    assert answers == [False, True, False, False, False, True]


@pytest.mark.parametrize(("step_s", "asked"), [(60.0, 100), (5.0, 100), (1.0, 20), (0.05, 1)])
def test_slow_steps_ask_each_time_and_quick_ones_every_five_seconds(notices, step_s, asked):
    watch = PreemptionWatch()
    watch.pace(step_s)
    assert not any(watch.calls(step) for step in range(1, 101))
    assert notices["asked"] == asked
