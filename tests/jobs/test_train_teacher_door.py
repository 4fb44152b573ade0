"""`dmd train-teacher` goes on with the teacher that it has, or refuses; no network is trained."""

from contextlib import contextmanager
from pathlib import Path

import pytest

from dmd_core.checkpoint import Checkpoint, save_checkpoint
from jobs import train_teacher
from jobs.cli import main
from jobs.errors import Exit
from jobs.session import Session


class WorkerGroup:
    """In place of the workers: a teacher that is trained in no time, up to step `step` (0: the
    group was lost before its first checkpoint). `starts`: how often it was begun."""

    step, starts = 8, 0

    def run(self, loop, config, *, store, **_):
        self.starts += 1
        if self.step:
            path = store.path(train_teacher.CHECKPOINTS)
            save_checkpoint(store.fs, path, Checkpoint(self.step, {}, {}), alone=True)


@pytest.fixture
def group(monkeypatch):
    @contextmanager
    def unwatched(*_):
        yield None

    def write_card(session, section, effort):
        folder = Path(section.output)
        folder.mkdir(exist_ok=True)
        (folder / train_teacher.CARD).write_text("a card")
        return {}

    group = WorkerGroup()
    monkeypatch.setattr(Session, "start_ray", lambda session: None)
    monkeypatch.setattr(Session, "watch", unwatched)
    monkeypatch.setattr("pipelines.workers.run_worker_group", group.run)
    monkeypatch.setattr(train_teacher, "check_room", lambda *_: None)
    monkeypatch.setattr(train_teacher, "_write_card", write_card)
    return group


def _train(folder, *settings: str, words: tuple[str, ...] = ()) -> int:
    arguments = ["train-teacher", "--config", "tiny", "--set", f"run.dir={folder}", *words]
    return main([*arguments, *(part for each in settings for part in ("--set", each))])


_OTHERS = {
    "train_teacher.unet_learning_rate": "0.5",
    "train_teacher.image_size": "64",
    "train_teacher.unet_channels": "[32, 64]",
    "run.seed": "7",
}


@pytest.mark.parametrize("step", [8, 6], ids=["finished", "unfinished"])
@pytest.mark.parametrize("words", [(), ("--dry-run",)], ids=["run", "plan"])
def test_other_settings_of_a_teacher_that_is_there_are_refused(tmp_path, group, capfd, step, words):
    group.step = step
    assert _train(tmp_path / "run") == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    others = [f"{key}={value}" for key, value in _OTHERS.items()]
    capfd.readouterr()
    assert _train(tmp_path / "run", *others, words=words) == Exit.REFUSED
    said = capfd.readouterr().err
    assert all(f"{key}: " in said and f"→ {value}" in said for key, value in _OTHERS.items())
    assert "teacher of other settings" in said and "trained" not in said
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    assert group.starts == 1  # the first start, and no other


def test_where_and_how_long_a_teacher_is_trained_may_change(tmp_path, group, capfd):
    assert _train(tmp_path / "run") == 0
    places = ("num_workers=2", "threads_per_worker=2", "max_failures=0", "checkpointing_steps=3")
    assert _train(tmp_path / "run", *(f"train_teacher.{each}" for each in places)) == 0
    assert "nothing to do" in capfd.readouterr().err and group.starts == 1
    group.step = 10
    assert _train(tmp_path / "run", "train_teacher.unet_steps=6") == 0
    assert group.starts == 2
    assert _train(tmp_path / "run", "train_teacher.unet_steps=5") == Exit.REFUSED
    said = capfd.readouterr().err
    assert "a teacher of 10 steps" in said and "these make 9" in said


def test_before_the_first_checkpoint_every_setting_may_change(tmp_path, group):
    group.step = 0
    assert _train(tmp_path / "run") == 0
    group.step = 6
    assert _train(tmp_path / "run", "train_teacher.unet_learning_rate=0.5") == 0
    assert _train(tmp_path / "run") == Exit.REFUSED
    assert group.starts == 2


def test_a_teacher_without_a_record_goes_on(tmp_path, group, capfd):
    """It was begun by a release that kept none."""
    assert _train(tmp_path / "run") == 0
    (tmp_path / "run" / train_teacher.SETTINGS).unlink()
    assert _train(tmp_path / "run", "train_teacher.unet_learning_rate=0.5") == 0
    assert "nothing to do" in capfd.readouterr().err
    assert not (tmp_path / "run" / train_teacher.SETTINGS).exists()


@pytest.mark.parametrize("words", [(), ("--dry-run",)], ids=["run", "plan"])
def test_a_run_in_a_bucket_needs_a_local_folder_for_the_teacher(capfd, group, words):
    assert _train("s3://bucket/runs/t", words=words) == Exit.USAGE
    said = capfd.readouterr().err
    assert "train_teacher.output is s3://bucket/runs/t/teacher" in said and "local folder" in said
    assert group.starts == 0
