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
from jobs.errors import Exit
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
    root = session.store.path(CHECKPOINTS)
    save_checkpoint(session.store.fs, root, Checkpoint(2, networks.parts(), state), alone=True)

    def run(verb: str, **changes: object) -> tuple[int, str]:
        return run_tiny(verb, base, changes, capfd)

    run.folder = tmp_path / "run"
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
    assert dmd("export", teacher__path=moved)[0] == Exit.OK

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


def test_a_key_that_a_later_release_added_locks_no_run_out(dmd):
    config = dmd.folder / "config.yaml"
    lines = [line for line in config.read_text().splitlines() if "max_grad_norm" not in line]
    config.write_text("\n".join(lines))
    assert dmd("export")[0] == Exit.OK
    code, said = dmd("export", train__max_grad_norm=2.0)
    assert code == Exit.REFUSED and "train.max_grad_norm: 10.0 → 2.0" in said
