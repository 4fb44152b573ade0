"""What a person did wrong, or only asked, is told in words: no traceback, the right exit code."""

import importlib.metadata
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from ray.exceptions import RayError

import cluster.local
import jobs.data
import jobs.pairs
from jobs.cli import main
from jobs.errors import Exit
from tests.jobs.tiny_cli import run_tiny


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_too_few_prompts_to_evaluate_with(tiny_teacher_dir, tmp_path, capsys, words):
    run, prompts = tmp_path / "run", tmp_path / "held_out.txt"
    run.mkdir()
    (run / "student.json").write_text("{}")
    prompts.write_text("one\ntwo\none")
    base = {"run.dir": run, "teacher.path": tiny_teacher_dir, "evaluate.prompts": prompts}
    code, said = run_tiny("evaluate", base, {}, capsys, words)
    assert code == Exit.REFUSED and said.startswith("error: evaluate.prompts gives 2 distinct")


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
@pytest.mark.parametrize("url", ["minio:9000", "http://me:secret@minio:9000"])
def test_an_endpoint_that_is_no_url(tmp_path, capsys, words, url):
    arguments = ["data", "cifar10", "--out", str(tmp_path), "--endpoint-url", url, *words]
    assert main(arguments) == Exit.USAGE
    said = capsys.readouterr().err
    assert said.startswith("error: --endpoint-url: ") and said.count("\n") == 1
    assert "minio:9000" in said and "secret" not in said


@pytest.mark.parametrize("place", ["s3://bucket/run", "a folder"])
def test_the_file_with_the_whole_story_is_named(place, tmp_path, monkeypatch, capfd):
    def fail(session):
        session.start_ray()
        raise RayError("Traceback\n  the whole story\nZeroDivisionError: division by zero")

    monkeypatch.setattr(cluster.local, "ray_cluster", lambda **settings: nullcontext())
    monkeypatch.setattr(jobs.pairs, "run", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "stderr", open(2, "w", 1, closefd=False))  # the process's own
    folder = place if place.startswith("s3") else tmp_path / "run"
    assert main(["pairs", "--config", "tiny", "--set", f"run.dir={folder}"]) == Exit.BUG
    said = capfd.readouterr().err
    assert said.startswith("error: a worker failed: ZeroDivisionError: division by zero (the whole")
    log = Path(said.strip().removesuffix(")").rsplit(" ", 1)[-1])
    assert log.name == "ray.log" and "the whole story" in log.read_text()


@pytest.mark.parametrize("installed", [True, False])
def test_the_version(monkeypatch, capsys, installed):
    expected = importlib.metadata.version("one-step-dmd")
    if not installed:
        expected = "of a source tree, not installed"

        def nowhere(name: str) -> str:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", nowhere)
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"dmd {expected}\n"


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_reader_that_leaves_is_no_error(monkeypatch, capfd, size):
    """As `dmd … | head` does, before or after the output has filled a buffer."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    monkeypatch.setattr(jobs.data, "plan", lambda options, display: {"log": "x" * size})
    assert main(["data", "cifar10", "--dry-run", "--json"]) == 141
    sys.stdout.close()  # nothing is left in it that could not be sent
    assert capfd.readouterr().err == ""


def test_another_connection_that_breaks_is_an_error(monkeypatch, capfd):
    def broken(options, display):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(jobs.data, "plan", broken)
    assert main(["data", "cifar10", "--dry-run"]) == Exit.REFUSED
    assert "Broken pipe" in capfd.readouterr().err
