"""`dmd logs --follow --json`: the whole log and the job's own exit code, once it has ended."""

import json

import pytest

from jobs import logs
from jobs.cli import main
from jobs.errors import Exit
from tests.cluster.fake_job_server import job_server


@pytest.mark.parametrize(
    ("status", "exit_code", "expected"),
    [("SUCCEEDED", 0, Exit.OK), ("FAILED", 5, Exit.REJECTS), ("STOPPED", None, Exit.TRANSIENT)],
)
def test_a_job_is_followed_to_its_end(tmp_path, monkeypatch, capfd, status, exit_code, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # without a local cluster
    with job_server() as fake:
        fake.start("a")
        fake.logs["a"] = "one\n"

        def ends(seconds: float) -> None:
            fake.logs["a"] += "two\n"
            fake.end("a", status, exit_code)

        monkeypatch.setattr(logs, "pause", ends)
        code = main(["logs", "a", "--follow", "--json", "--address", fake.address])
    found = json.loads(capfd.readouterr().out)
    assert code == expected
    assert (found["status"], found["exit_code"], found["log"]) == (status, exit_code, "one\ntwo\n")
