"""What people see of `dmd pairs` and `dmd regenerate`: rate, time left, rows, rejects and cost."""

import json
import re
from pathlib import Path

import pytest

from jobs import display
from jobs.cli import main
from jobs.pairs import _Cost, changes_in_words, cost_in_words, pair_order
from jobs.session import open_session
from pipelines import generate
from pipelines.config import PairsSection
from pipelines.factory import Changes
from tests.jobs.tiny_cli import run_tiny
from tests.pipelines.pool_teachers import TellingTeacher

BLOCK, BUSY_S, UNIT = 2, TellingTeacher.BUSY_S, "teacher-s without a GPU"
PROMPTS = [f"prompt {index}" for index in range(11)]


class Verbs:
    """`dmd <verb>` on one data set, with teachers that only say that they work."""

    def __init__(self, folder: Path, teacher: str, capfd) -> None:
        self._prompts, self.capfd, self.pairs = folder / "prompts.txt", capfd, folder / "run/pairs"
        self._prompts.touch()
        self._settings = {
            "run.dir": folder / "run", "teacher.path": teacher, "pairs.prompts": self._prompts,
            "pairs.batch_size": BLOCK, "pairs.rows_per_block": BLOCK, "pairs.max_rejected_share": 1,
        }  # fmt: skip

    def __call__(self, verb: str, prompts: list[str]) -> str:
        """What it says with these prompts."""
        self._prompts.write_text("\n".join(prompts))
        code, said = run_tiny(verb, self._settings, {}, self.capfd)
        assert code == 0, said
        return said

    def result(self, verb: str) -> dict:
        options = [f"--set={setting}" for setting in self._overrides()]
        assert main([verb, "--config", "tiny", "--json", *options]) == 0
        return json.loads(self.capfd.readouterr().out)

    def leave_a_killed_run(self, busy_s: float) -> None:
        with open_session("tiny", self._overrides(), quiet=True) as session:
            folder = self.pairs / pair_order(session).fingerprint.folder / "runs"
        folder.mkdir(parents=True)
        record = {"fence": 99, "rows": 3, "busy_s": busy_s, "gpu_s": 0.0, "seconds": 60.0}
        (folder / "000099.json").write_text(json.dumps(record))

    def _overrides(self) -> list[str]:
        return [f"{key}={value}" for key, value in self._settings.items()]


@pytest.fixture
def dmd(ray_cluster, tiny_teacher_dir, tmp_path, capfd, monkeypatch) -> Verbs:
    monkeypatch.setattr(generate, "TeacherActor", TellingTeacher)
    monkeypatch.setattr(display, "_LOG_SECONDS", 0.2)
    return Verbs(tmp_path, tiny_teacher_dir, capfd)


@pytest.mark.slow
def test_rate_time_left_rows_rejects_and_cost_are_shown_meanwhile_and_at_the_end(dmd):
    dmd.leave_a_killed_run(busy_s=30.0)
    said = dmd("regenerate", [*PROMPTS, "refused"])
    assert "regenerate: no version yet; 12 of 12 rows to make" in said
    line = r"^regenerate: \d+/12 [\d.]+ pairs/s, \d+ s left  (1 rejected  )?"
    assert re.search(rf"{line}[\d.]+ {UNIT} so far$", said, re.M), said
    assert re.search(r"^regenerate: \d+/12 .*  1 rejected  ", said, re.M), said
    spent = 6 * BUSY_S  # by six blocks, and then what the killed run has spent
    total = f"{30 + spent:.0f} {UNIT}"
    shown = re.findall(rf"^regenerate: \d+/12 .* ([\d.]+) {UNIT} so far$", said, re.M)
    assert shown and all(30 < float(seconds) <= 30 + spent for seconds in shown), said
    end = f"11 pairs, 1 rejected in {dmd.pairs} (version 1); 11 made now for {spent:.0f} {UNIT}"
    assert f"✓ regenerate: {end}; cost so far {total}" in said

    # Runs in which no teacher works say it, too: one that only seals, and one with nothing to do.
    said = dmd("pairs", PROMPTS)
    assert "pairs: rows +0 −1; 0 of 11 rows to make" in said
    assert f"✓ pairs: 11 pairs in {dmd.pairs} (version 2); cost so far {total}" in said
    said = dmd("regenerate", PROMPTS)
    assert "✓ regenerate: nothing to do, 11 pairs in" in said and f"; cost so far {total}" in said
    for verb in ("pairs", "regenerate"):
        cost = dmd.result(verb)["cost_so_far"]
        assert (cost["runs"], cost["cpu_s"], cost["gpu_s"]) == (2, 30 + spent, 0.0)
    assert main(["inspect", str(dmd.pairs)]) == 0
    said = dmd.capfd.readouterr().err
    assert "generations, and their cost so far" in said and "loading and waiting are in" in said
    assert re.search(rf"│ +2 │ +0 │ +{30 + spent:.0f} │", said), said  # runs, GPU-s, teacher-s


def test_seconds_on_gpus_are_counted_by_what_a_teacher_has_of_one():
    halves, none = (_Cost(PairsSection(gpus_per_actor=gpus)) for gpus in (0.5, 0))
    fields = {"busy_s": 30.0, "rejected": 3, "phase": "generating"}
    assert halves(fields) == "3 rejected  15 GPU-s so far"
    earlier = {"earlier_gpu_s": 100.0, "earlier_cpu_s": 7.0}
    assert halves(fields | earlier) == f"3 rejected  115 GPU-s and 7.0 {UNIT} so far"
    assert none(fields | earlier) == f"3 rejected  100 GPU-s and 37 {UNIT} so far"
    assert cost_in_words(0.0, 0.0) == f"0.0 {UNIT}"


def test_lost_files_are_said():
    changes = Changes({}, 0, 0, rows=9, sizes={(None, None): 4}, lost=2)
    told = "files of the newest version that are gone: 2; 4 of 9 rows to make"
    assert changes_in_words(changes) == told
