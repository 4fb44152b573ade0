"""`dmd demo` killed (SIGKILL, the whole process group) while it makes pairs, trains and evaluates,
then started again each time: it finishes, and no pair is computed twice beyond the blocks in
flight.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

PROMPTS, BLOCK = 64, 8
PATIENCE_S = 300


class Demo:
    """The demo as a user starts it: a process of its own."""

    def __init__(self, folder: Path, teacher: str) -> None:
        self.run = folder / "run"
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(f"prompt {index}" for index in range(PROMPTS)))
        settings = {
            "run.dir": self.run, "teacher.path": teacher, "pairs.prompts": prompts,
            "evaluate.prompts": prompts, "train.max_train_steps": 60,
            "train.checkpointing_steps": 5, "pairs.steps": 40,
        }  # fmt: skip
        self.command = [sys.executable, "-m", "jobs.demo", "--config", "tiny"]
        self.command += [p for k, v in settings.items() for p in ("--set", f"{k}={v}")]

    def start(self) -> subprocess.Popen:
        root = Path(__file__).parents[2]
        return subprocess.Popen(
            self.command, cwd=root, start_new_session=True, stderr=subprocess.PIPE, text=True
        )

    def kill_when(self, reached: Callable[[], bool]) -> None:
        process = self.start()
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline, "the demo did not get there"
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # Ray's own processes notice that their driver is gone.
        time.sleep(2)

    def finish(self) -> str:
        process = self.start()
        _, errors = process.communicate(timeout=2 * PATIENCE_S)
        assert process.returncode == 0, errors
        return errors

    def ledger(self) -> set[Path]:
        found = (self.run / "pairs" / "generations").rglob("ledger/*.parquet")
        return {path for path in found if ".pending" not in path.name}

    def rows(self) -> list[int]:
        files = (self.run / "pairs" / "generations").rglob("data/*.parquet")
        return [i for file in files for i in pq.read_table(file)["pair_id"].to_pylist()]


@pytest.mark.slow
def test_a_demo_killed_at_three_stations_finishes(tiny_teacher_dir, tmp_path):
    demo = Demo(tmp_path, tiny_teacher_dir)
    demo.kill_when(lambda: len(demo.ledger()) >= 2)
    kept = demo.ledger()
    assert len(kept) * BLOCK < PROMPTS, "killed too late to tell anything"

    demo.kill_when(lambda: any((demo.run / "checkpoints").glob("*/MANIFEST.json")))
    assert kept <= demo.ledger()  # committed blocks were not made again
    assert sorted(demo.rows()) == sorted(set(demo.rows())) and len(demo.rows()) == PROMPTS
    checkpoints = {path.parent.name for path in demo.run.glob("checkpoints/*/MANIFEST.json")}

    demo.kill_when(lambda: any((demo.run / "evaluation").rglob("*.parquet")))
    lines = [json.loads(line) for line in (demo.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    sampled = {path: path.stat().st_mtime_ns for path in demo.run.glob("evaluation/**/*.parquet")}
    assert checkpoints

    assert "finished in" in demo.finish()
    assert (demo.run / "report.html").exists()
    assert {p: p.stat().st_mtime_ns for p in sampled} == sampled  # not sampled again
    again = demo.finish()
    assert again.count("nothing to do") == 5
