"""The doctor's look at a teacher's label and at prompts: no more work than there is to do, and no
end to the other checks."""

import json
import shutil

import pytest
import torch

from dmd_core.teacher import folder_schedule
from jobs import doctor_teacher
from jobs.doctor_teacher import TeacherChecks, prompts
from jobs.errors import Exit
from jobs.session import open_session
from jobs.teacher_here import first_prompt
from tests.jobs.tiny_cli import run_tiny


def _label(folder: str, *settings: str):
    chosen = [f"teacher.path={folder}", "pairs.prompts=shipped:demo", *settings]
    with open_session("tiny", chosen, quiet=True) as session:
        return TeacherChecks(session, session.teacher_dir).label(deep=True)


@pytest.mark.parametrize("name", ["flux", "sd3 dynamic", "edm"])
def test_what_can_have_no_wrong_label_is_not_loaded(families, name, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the teacher's networks were loaded")

    monkeypatch.setattr(doctor_teacher, "load_teacher", never)
    check = _label(families.folder(name))
    assert check.status == "ok" and "cannot be read otherwise" in check.found


@pytest.mark.parametrize("name", ["sd v", "sdxl", "sd3 dynamic", "edm"])
def test_a_schedule_without_weights_is_the_teacher_s(families, name):
    found, expected = folder_schedule(families.folder(name)), families.teacher(name).schedule
    assert found.prediction_type == expected.prediction_type
    assert found.num_timesteps == expected.num_timesteps


def test_a_gpu_that_is_too_small_is_a_warning(families, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(doctor_teacher, "load_teacher", full)
    check = _label(families.folder("sd"))
    assert check.status == "warn" and "out of memory" in check.found and check.advice


def test_a_scheduler_that_is_not_read_fails_its_check_alone(families, tmp_path):
    folder = shutil.copytree(families.folder("sd"), tmp_path / "teacher")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "odd"}))
    check = _label(str(folder))
    assert check.status == "fail" and "prediction_type 'odd'" in check.found


@pytest.mark.parametrize(
    ("text", "said"),
    [("cat\nno class", "'no class' is not a class"), ("", "no prompts"), (None, "no such file")],
)
def test_prompts_that_a_teacher_cannot_read_fail_its_check(families, tmp_path, text, said):
    if text is not None:
        (tmp_path / "prompts.txt").write_text(text)
    check = _label(families.folder("ddpm"), f"pairs.prompts={tmp_path}/prompts.txt")
    assert check.status == "fail" and said in check.found
    assert "pairs.prompts" in check.advice


def test_a_dry_run_refuses_a_prompt_that_a_teacher_cannot_read(families, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("no class\ncat")
    base = {
        "run.dir": tmp_path / "run", "teacher.path": families.folder("ddpm"),
        "pairs.prompts": tmp_path / "prompts.txt", "pairs.solver": "ddim",
        "pairs.guidance_scale": 1,
    }  # fmt: skip
    code, message = run_tiny("pairs", base, {}, capsys, words=["--dry-run"])
    assert code == Exit.REFUSED, message
    assert "pairs.prompts: prompt 'no class' is not a class of the teacher" in message


def test_an_empty_first_file_is_passed_over(tiny_teacher_dir, tmp_path):
    for name, text in (("0.txt", ""), ("1.txt", "a fox\na whale\n"), ("2.txt", "a tree\n")):
        (tmp_path / name).write_text(text)
    chosen = [f"teacher.path={tiny_teacher_dir}", f"pairs.prompts={tmp_path}/*.txt"]
    with open_session("tiny", chosen, quiet=True) as session:
        check = prompts(session)
        assert check.status == "ok" and "3 files; 2 rows in" in check.found
        assert "1.txt" in check.found
        assert first_prompt(session) == "a fox"  # what `dmd pairs --dry-run` measures with
        checks = TeacherChecks(session, tiny_teacher_dir)
        assert checks._some_prompts() == ["a fox", "a whale", "a tree"]
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text("")
    with open_session("tiny", chosen, quiet=True) as session:
        check = prompts(session)
        assert check.status == "fail" and "0.txt" in check.found
