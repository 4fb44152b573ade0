"""What a verb says is shown as it is, whatever is in it."""

import time

import pytest

from jobs import display
from jobs.display import Display, _Rate


@pytest.mark.parametrize(
    "text", ["runs/[new]/x", "http://[fe80::1]:8265", "a [/x] and [red]", ":dog: in a park"]
)
def test_text_is_no_markup(capfd, text):
    Display().done(text)
    Display().say(text)
    assert capfd.readouterr().err.splitlines() == [f"✓ {text}", text]


def test_no_more_is_shown_than_there_is_to_do(capfd, monkeypatch):
    """A worker died, and its rows were counted twice."""
    monkeypatch.setattr(display, "_LOG_SECONDS", 0.01)
    with Display().stage("pairs", 12, "pairs", lambda: (20, {}), lambda fields: ""):
        time.sleep(0.2)
    assert "pairs: 12/12" in capfd.readouterr().err


def test_another_count_of_the_same_stage_has_a_rate_of_its_own(monkeypatch):
    """Pictures are counted, then their features, from none on."""
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    rate = _Rate("pictures")
    rate(5000, {})
    now[0] = 10.0
    assert rate(6000, {}) == "100.0 pictures/s"
    rate(1000, {})
    now[0] = 20.0
    assert rate(1500, {}) == "50.0 pictures/s"
    assert rate.seconds_left(1500, 2000) == 10.0
