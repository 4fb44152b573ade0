"""What a verb says is shown as it is, whatever is in it."""

import pytest

from jobs.display import Display


@pytest.mark.parametrize("text", ["runs/[new]/x", "http://[fe80::1]:8265", "a [/x] and [red]"])
def test_text_is_no_markup(capfd, text):
    Display().done(text)
    Display().say(text)
    assert capfd.readouterr().err.splitlines() == [f"✓ {text}", text]
