"""Is another process gone? Only what is known counts."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.processes import is_gone, this_process

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def test_this_process_lives_and_an_earlier_one_of_its_number_does_not():
    here = this_process()
    assert not is_gone(here)
    assert is_gone(here | {"started": "1"})


def test_a_process_of_another_machine_is_never_known_to_be_gone():
    assert not is_gone(this_process() | {"started": "1", "boot": "another machine"})
    assert not is_gone({})


def test_an_ended_process_is_gone_buried_or_not():
    process = subprocess.Popen([sys.executable, "-c", ""])
    record = this_process() | {"pid": process.pid, "started": "1"}
    process.wait()
    assert is_gone(record)


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_a_process_that_cannot_be_looked_at_may_live(monkeypatch, error):
    """Where /proc is mounted with hidepid, and the process is another user's."""
    record, read = this_process() | {"started": "1"}, Path.read_text

    def hidden(path, *arguments, **options):
        if path.name == "stat":
            raise error(str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", hidden)
    assert not is_gone(record)
