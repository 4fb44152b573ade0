"""`dmd pipeline` on real Ray: the whole chain, killed (SIGKILL, the whole process group) while it
trains and while it evaluates, and on an S3 store.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

from jobs.cli import main
from jobs.errors import Exit
from tests.s3_servers import new_bucket

PROMPTS, PATIENCE_S = 16, 300


@pytest.fixture
def settings(tiny_teacher_dir, tmp_path) -> dict[str, object]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {index}" for index in range(PROMPTS)))
    return {
        "run.dir": tmp_path / "run", "teacher.path": tiny_teacher_dir, "pairs.prompts": prompts,
        "evaluate.prompts": prompts, "evaluate.few_steps": "[1]", "train.max_train_steps": 4,
    }  # fmt: skip


def _words(settings: dict[str, object]) -> list[str]:
    pairs = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["--config", "tiny", *pairs]


def _result(out: str) -> dict[str, Any]:
    """The JSON on stdout. The session's Ray may have written a warning before it."""
    return json.loads(out[out.index('{\n  "steps"') :])


def _ran(out: str) -> list[str]:
    return [name for name, step in _result(out)["steps"].items() if step["ran"]]


@pytest.mark.slow
def test_a_chain_and_what_a_changed_setting_runs(ray_cluster, settings, capfd):
    assert main(["pipeline", "--json", *_words(settings)]) == Exit.OK
    out = capfd.readouterr().out
    assert _ran(out) == ["regenerate", "train", "export", "evaluate", "report"]
    found = _result(out)
    page = Path(found["report"]).read_text()
    assert found["training"].rsplit("/", 1)[-1] in page
    assert DiffusionPipeline.from_pretrained(found["student"]) is not None
    student = {p: p.stat().st_mtime_ns for p in Path(found["student"]).rglob("*")}

    assert main(["pipeline", "--json", *_words(settings | {"evaluate.seed": 7})]) == Exit.OK
    assert _ran(capfd.readouterr().out) == ["evaluate", "report"]
    assert {p: p.stat().st_mtime_ns for p in Path(found["student"]).rglob("*")} == student
    assert Path(found["report"]).read_text() != page
    shutil.rmtree(Path(found["student"]) / "unet")
    assert main(["pipeline", "--json", *_words(settings | {"evaluate.seed": 7})]) == Exit.OK
    assert _ran(capfd.readouterr().out) == ["export"]  # it came out the same
    assert DiffusionPipeline.from_pretrained(found["student"]) is not None
    assert main(["pipeline", "--json", *_words(settings | {"evaluate.seed": 7})]) == Exit.OK
    assert _ran(capfd.readouterr().out) == []


@pytest.mark.slow
def test_a_chain_on_s3_with_grown_prompts(ray_cluster, settings, seaweed_options, capfd, tmp_path):
    store = new_bucket(seaweed_options, "chain")
    settings |= {"run.dir": store.url, "storage.endpoint_url": seaweed_options.endpoint_url}
    assert main(["pipeline", "--json", *_words(settings)]) == Exit.OK
    first = _result(capfd.readouterr().out)
    assert main(["pipeline", "--json", *_words(settings)]) == Exit.OK
    assert _ran(capfd.readouterr().out) == []

    with open(settings["pairs.prompts"], "a") as file:
        file.write("\none more\nand another")
    assert main(["pipeline", "--json", *_words(settings)]) == Exit.OK
    out = capfd.readouterr().out
    assert _ran(out) == ["regenerate", "train", "export", "evaluate", "report"]
    second = _result(out)
    assert second["training"] != first["training"]
    assert json.loads(store.fs.cat_file(store.path("latest.json")))["report"] == second["report"]
    version = json.loads(store.fs.cat_file(f"{second['training']}/pins.json"))["default"]
    assert version == 2
    for found in (first, second):
        assert store.fs.exists(found["report"])
        folder = tmp_path / found["training"].rsplit("/", 1)[-1]
        store.fs.get(found["student"] + "/", str(folder), recursive=True)
        assert DiffusionPipeline.from_pretrained(str(folder)) is not None


class Chain:
    """The verb as a user starts it: a process of its own."""

    def __init__(self, settings: dict[str, object]) -> None:
        self.run = Path(str(settings["run.dir"]))
        self.command = [sys.executable, "-m", "jobs.pipeline", *_words(settings)]

    def start(self) -> subprocess.Popen:
        root = Path(__file__).parents[2]
        return subprocess.Popen(
            self.command, cwd=root, start_new_session=True, stderr=subprocess.PIPE, text=True
        )

    def kill_when(self, reached: Callable[[], bool]) -> None:
        process, deadline = self.start(), time.monotonic() + PATIENCE_S
        while not reached():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline, "the chain did not get there"
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(2)  # Ray's own processes notice that their driver is gone

    def finish(self) -> str:
        process = self.start()
        _, errors = process.communicate(timeout=2 * PATIENCE_S)
        assert process.returncode == Exit.OK, errors
        return errors

    def find(self, pattern: str) -> list[Path]:
        return sorted(self.run.glob(f"trainings/*/{pattern}"))


@pytest.mark.slow
def test_a_chain_killed_in_training_and_in_evaluation_goes_on(settings):
    settings |= {"train.max_train_steps": 60, "train.checkpointing_steps": 5}
    chain = Chain(settings)
    chain.kill_when(lambda: len(chain.find("checkpoints/*/MANIFEST.json")) > 1)
    assert not chain.find("steps/train.json")
    sealed = (chain.run / "steps" / "regenerate.json").stat().st_mtime_ns

    chain.kill_when(lambda: bool(chain.find("evaluation/*/*/*.parquet")))
    assert len(chain.find("metrics.jsonl")) == 1, "the training went on in its folder"
    lines = [json.loads(line) for line in chain.find("metrics.jsonl")[0].read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert chain.find("steps/export.json") and not chain.find("steps/evaluate.json")
    sampled = {p: p.stat().st_mtime_ns for p in chain.find("evaluation/*/*/*.parquet")}

    said = chain.finish()
    assert "train: nothing to do" in said and "evaluate: not done yet" in said
    assert (chain.run / "latest" / "report.html").is_file()
    assert {p: p.stat().st_mtime_ns for p in sampled} == sampled  # not sampled again
    assert (chain.run / "steps" / "regenerate.json").stat().st_mtime_ns == sealed
    assert chain.finish().count("nothing to do") == 5
