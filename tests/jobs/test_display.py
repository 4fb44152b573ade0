"""What a verb says is shown as it is, whatever is in it."""

import time

import pytest

from jobs import display
from jobs.display import Display


@pytest.mark.parametrize("text", ["runs/[new]/x", "http://[fe80::1]:8265", "a [/x] and [red]"])
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
