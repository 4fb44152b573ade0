"""`dmd export`, `evaluate` and `report` take the run's own recipe and teacher, and no other."""

import json
import shutil
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from dmd_core.checkpoint import Checkpoint, save_checkpoint
from dmd_core.networks import DmdNetworks
from dmd_core.parallel import World
from dmd_core.teacher import load_teacher
from jobs import evaluate
from jobs.errors import Exit, JobError
from jobs.session import open_session
from pipelines.run_folder import CHECKPOINTS
from pipelines.train_settings import trainer_settings
from tests.jobs.tiny_cli import run_tiny

FOUR_STEPS = "[999, 749, 499, 249]"


@pytest.fixture
def dmd(tiny_teacher_dir, tmp_path, capfd):
    """A run of a four-step student, as `dmd train` would leave it, untrained."""
    base = {
        "run.dir": tmp_path / "run",
        "teacher.path": tiny_teacher_dir,
        "train.student_timesteps": FOUR_STEPS,
        "train.lambda_reg": 0,
    }
    session = open_session("tiny", [f"{key}={value}" for key, value in base.items()], quiet=True)
    session.open_run()
    teacher = load_teacher(tiny_teacher_dir)
    networks = DmdNetworks(teacher, trainer_settings(session.recipe.train, 0), World())
    state = {"pairs_digest": "", "pairs_segments": [], "teacher_revision": teacher.revision}

    def save(folder: Path, step: int, shift: float = 0.0) -> None:
        """`shift`: added to the student's weights."""
        parts = networks.parts()
        student = {name: value + shift for name, value in parts["generator"].items()}
        checkpoint = Checkpoint(step, parts | {"generator": student}, state)
        save_checkpoint(session.store.fs, str(folder / CHECKPOINTS), checkpoint, alone=True)

    def run(verb: str, **changes: object) -> tuple[int, str]:
        return run_tiny(verb, base, changes, capfd)

    run.folder, run.save = tmp_path / "run", save
    save(run.folder, 2)
    return run


def test_another_recipe_is_refused_and_what_may_change_is_not(dmd):
    code, said = dmd("export", train__student_timesteps="[999]")
    assert code == Exit.REFUSED
    assert "train.student_timesteps: [999, 749, 499, 249] → [999]" in said and "--config" in said
    assert not (dmd.folder / "student").exists()

    assert dmd("export", train__max_train_steps=9, evaluate__seed=3)[0] == Exit.OK
    exported = json.loads((dmd.folder / "student.json").read_text())
    assert exported["num_inference_steps"] == 4
    for verb in ("evaluate", "report"):
        (dmd.folder / "metrics.json").write_text("{}")
        code, said = dmd(verb, pairs__guidance_scale=3.0)
        assert code == Exit.REFUSED and "pairs.guidance_scale: 2.0 → 3.0" in said, verb


def test_a_teacher_elsewhere_is_taken_and_another_one_is_refused(dmd, tiny_teacher_dir, tmp_path):
    moved = Path(shutil.copytree(tiny_teacher_dir, tmp_path / "moved"))
    (moved / "README.md").write_text("---\nlicense: mit\n---\n")
    assert dmd("export", teacher__path=moved)[0] == Exit.OK
    assert "\nlicense: mit\n" in (dmd.folder / "student" / "README.md").read_text()

    shutil.rmtree(dmd.folder / "student")
    config = moved / "unet" / "config.json"
    config.write_text(config.read_text() + "\n")  # other files, another revision
    code, said = dmd("export", teacher__path=moved)
    assert code == Exit.REFUSED and f"teacher.path {moved} has revision" in said
    assert not (dmd.folder / "student").exists()

    assert dmd("export")[0] == Exit.OK
    code, said = dmd("evaluate", teacher__path=moved)
    assert code == Exit.REFUSED and f"teacher.path {moved} has revision" in said


def test_a_student_that_was_removed_is_exported_again(dmd):
    assert dmd("export")[0] == Exit.OK
    assert "nothing to do" in dmd("export")[1]
    shutil.rmtree(dmd.folder / "student")
    code, said = dmd("export")
    assert code == Exit.OK and "nothing to do" not in said
    assert DiffusionPipeline.from_pretrained(str(dmd.folder / "student")) is not None


def _exported(folder: Path) -> dict:
    return json.loads((folder / "student.json").read_text())


def test_a_step_that_was_trained_again_is_exported_again(dmd):
    """A rollback gives up the checkpoint of a step, which is trained anew with other weights."""
    assert dmd("export")[0] == Exit.OK
    given_up = _exported(dmd.folder)
    shutil.rmtree(dmd.folder / CHECKPOINTS)
    dmd.save(dmd.folder, 2, shift=0.5)
    code, said = dmd("export")
    assert code == Exit.OK and "nothing to do" not in said
    again = _exported(dmd.folder)
    assert again["step"] == given_up["step"] == 2
    assert again["student_revision"] != given_up["student_revision"]
    assert "nothing to do" in dmd("export")[1]

    del again["checkpoint_digest"]  # as an earlier release left it
    (dmd.folder / "student.json").write_text(json.dumps(again))
    assert "nothing to do" not in dmd("export")[1]
    assert _exported(dmd.folder)["student_revision"] == again["student_revision"]


@pytest.fixture
def sampled(monkeypatch) -> list[str]:
    """The students that `dmd evaluate` would sample: it stops before it does."""
    found: list[str] = []

    def networks(**given: object):
        found.append(str(given["student"]))
        raise JobError("sampling now", Exit.TRANSIENT)

    monkeypatch.setattr(evaluate, "Networks", networks)
    monkeypatch.setattr(evaluate, "_mean_latents", lambda session: None)
    return found


def test_a_moved_run_is_evaluated_where_it_is(dmd, tmp_path, sampled):
    assert dmd("export")[0] == Exit.OK
    moved = dmd.folder.rename(tmp_path / "moved")
    code, said = dmd("export", run__dir=moved)
    assert code == Exit.OK and f"nothing to do, step 2 is in {moved / 'student'}" in said
    assert dmd("evaluate", run__dir=moved)[0] == Exit.TRANSIENT
    assert sampled == [str(moved / "student")]


def test_a_copied_run_is_evaluated_by_its_own_student(dmd, tmp_path, sampled):
    assert dmd("export")[0] == Exit.OK
    copy = Path(shutil.copytree(dmd.folder, tmp_path / "copy"))
    dmd.save(dmd.folder, 4, shift=0.5)
    assert dmd("export")[0] == Exit.OK
    assert _exported(copy)["student_revision"] != _exported(dmd.folder)["student_revision"]
    assert dmd("evaluate", run__dir=copy)[0] == Exit.TRANSIENT
    assert sampled == [str(copy / "student")]


def test_a_student_that_is_not_the_exported_one_is_not_evaluated(dmd, sampled):
    assert dmd("export")[0] == Exit.OK
    config = dmd.folder / "student" / "unet" / "config.json"
    config.write_text(config.read_text() + "\n")
    code, said = dmd("evaluate")
    assert code == Exit.REFUSED and f"{dmd.folder / 'student'} has revision" in said
    assert "Remove student.json, and run `dmd export` again" in said
    (dmd.folder / "student.json").unlink()  # the way on that the message names
    assert dmd("export")[0] == Exit.OK and dmd("evaluate")[0] == Exit.TRANSIENT

    shutil.rmtree(dmd.folder / "student")
    code, said = dmd("evaluate")
    assert code == Exit.REFUSED and f"{dmd.folder / 'student'} is gone; run `dmd export`" in said
    assert len(sampled) == 1


def test_a_key_that_a_later_release_added_locks_no_run_out(dmd):
    config = dmd.folder / "config.yaml"
    lines = [line for line in config.read_text().splitlines() if "max_grad_norm" not in line]
    config.write_text("\n".join(lines))
    assert dmd("export")[0] == Exit.OK
    code, said = dmd("export", train__max_grad_norm=2.0)
    assert code == Exit.REFUSED and "train.max_grad_norm: 10.0 → 2.0" in said
