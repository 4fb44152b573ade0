"""`dmd pipeline`: which training is found again, wherever it lies, however its pairs are named."""

import json
import shutil
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.errors import Exit, JobError
from jobs.pipeline_steps import NAMES

ALL = list(NAMES)
FROM_TRAINING = ALL[1:]
FOLLOW = {"train__follow_pairs": "epoch"}
STOPPED = JobError("stopped", Exit.TRANSIENT)


# ------------------------------------------------------------------------ pairs


@pytest.mark.parametrize("settings", [FOLLOW, {}], ids=["follow", "stay"])
def test_a_training_without_a_checkpoint_is_left_when_the_pairs_have_grown(pipeline, settings):
    """It was to begin with the version that its folder is named for."""
    pipeline.verbs.refuse["train"] = STOPPED
    assert pipeline(**settings)[0] == Exit.TRANSIENT
    begun = pipeline.trainings()
    pipeline.write_prompts(15)
    code, said, ran = pipeline(**settings)
    assert code == Exit.OK and ran == ALL, said
    assert len(pipeline.trainings()) == 2 and pipeline.latest().name not in begun
    pins = json.loads((pipeline.latest() / "pins.json").read_text())
    assert pins["default"] == 2
    assert pipeline(**settings)[2] == []


def test_a_training_that_has_followed_is_done_once_more_on_the_newest_pairs(pipeline):
    pipeline.verbs.fail["train"] = STOPPED
    pipeline(**FOLLOW)
    pipeline.write_prompts(15)
    assert pipeline(**FOLLOW)[0] == Exit.OK  # begun on version 1, ended on version 2
    first = pipeline.latest()
    code, said, ran = pipeline("--from", "train", **FOLLOW)
    assert code == Exit.OK and ran == FROM_TRAINING, said
    assert pipeline.latest() != first and len(pipeline.trainings()) == 2
    assert pipeline(**FOLLOW)[2] == []


def _change_the_guidance_and_put_it_back(pipeline, **settings):
    assert pipeline(pairs__guidance_scale=3.0, **settings)[0] == Exit.OK
    return pipeline(**settings)


def _shorten_the_prompts(pipeline, **settings):
    pipeline.write_prompts(15)
    assert pipeline(**settings)[0] == Exit.OK
    pipeline.write_prompts(12)
    return pipeline(**settings)


@pytest.mark.parametrize(
    "there_and_back", [_change_the_guidance_and_put_it_back, _shorten_the_prompts]
)
@pytest.mark.parametrize("settings", [FOLLOW, {}], ids=["follow", "stay"])
def test_pairs_put_back_find_their_training(pipeline, there_and_back, settings):
    """The same rows are another version then."""
    pipeline(**settings)
    first = pipeline.latest()
    code, said, ran = there_and_back(pipeline, **settings)
    assert code == Exit.OK and ran == ["regenerate"], said
    assert (pipeline.run / "pairs/manifests/000003.json").exists()
    assert pipeline.latest() == first and len(pipeline.trainings()) == 2
    assert pipeline(**settings)[2] == []
    assert json.loads((first / "pins.json").read_text())["default"] == 1


def test_pairs_put_back_find_a_training_that_was_stopped(pipeline):
    pipeline.verbs.fail["train"] = STOPPED
    pipeline()
    begun = pipeline.trainings()
    code, said, ran = _change_the_guidance_and_put_it_back(pipeline)
    assert code == Exit.OK and ran == ALL, said
    assert [pipeline.latest().name] == begun and len(pipeline.trainings()) == 2
    assert json.loads((pipeline.latest() / "pins.json").read_text())["default"] == 1


def test_pairs_put_back_find_what_dmd_train_made_of_them(pipeline):
    _verbs(pipeline, "regenerate", "train")
    code, said, ran = _change_the_guidance_and_put_it_back(pipeline)
    assert code == Exit.OK and ran == ALL, said  # train says itself that there is nothing to do
    assert pipeline.latest() == pipeline.run and len(pipeline.trainings()) == 1
    assert pipeline()[2] == []


def test_a_training_put_back_is_done_once_more(pipeline):
    pipeline()
    first = pipeline.latest()
    _change_the_guidance_and_put_it_back(pipeline)
    code, said, ran = pipeline("--from", "train")
    assert code == Exit.OK and ran == FROM_TRAINING, said
    assert pipeline.latest() != first and len(pipeline.trainings()) == 3
    assert pipeline()[2] == []


def test_a_training_whose_version_is_gone_is_not_found(pipeline):
    """It could not be gone on with, nor evaluated: it is done anew, and stays as it is."""
    pipeline()
    first = pipeline.latest()
    pipeline(pairs__guidance_scale=3.0)
    (pipeline.run / "pairs/manifests/000001.json").unlink()
    code, said, ran = pipeline()
    assert code == Exit.OK and ran == ALL, said
    assert pipeline.latest() != first and len(pipeline.trainings()) == 3


def test_other_rows_under_the_same_settings_make_another_training(pipeline):
    pipeline()
    first = pipeline.latest()
    shutil.rmtree(pipeline.run / "pairs")
    pipeline.write_prompts(13)
    code, said, ran = pipeline()
    assert code == Exit.OK and ran == ALL, said
    assert pipeline.latest() != first


# ------------------------------------------------------------------------ places


def _name_the_run_relatively(pipeline, monkeypatch) -> None:
    monkeypatch.chdir(pipeline.run.parent)
    pipeline.base["run.dir"] = "run"


def _move_the_run(pipeline, monkeypatch) -> None:
    moved = pipeline.run.parent / "elsewhere" / "run"
    moved.parent.mkdir()
    pipeline.run = pipeline.base["run.dir"] = pipeline.run.rename(moved)


def _move_the_teacher(pipeline, monkeypatch) -> None:
    moved = pipeline.run.parent / "teacher"
    shutil.copytree(str(pipeline.base["teacher.path"]), moved)
    pipeline.base["teacher.path"] = moved


def _name_the_pairs(pipeline, monkeypatch) -> None:
    pipeline.base["pairs.root"] = pipeline.run / "pairs"


@pytest.mark.parametrize(
    "move", [_name_the_run_relatively, _move_the_run, _move_the_teacher, _name_the_pairs]
)
@pytest.mark.parametrize("stopped_in", ["train", "export"])
def test_a_training_goes_on_wherever_it_and_its_parts_lie(pipeline, monkeypatch, move, stopped_in):
    pipeline.verbs.fail[stopped_in] = STOPPED
    assert pipeline()[0] == Exit.TRANSIENT
    begun = pipeline.trainings()
    move(pipeline, monkeypatch)
    code, said, ran = pipeline()
    assert code == Exit.OK, said
    assert [step for step in ran if step != "regenerate"] == ALL[ALL.index(stopped_in) :]
    assert (
        pipeline.trainings() == begun and pipeline.latest() == pipeline.run / "trainings" / begun[0]
    )
    assert Path(json.loads((pipeline.run / "latest.json").read_text())["report"]).is_file()
    code, said, ran = pipeline(train__max_train_steps=8)  # longer
    assert code == Exit.OK and ran == FROM_TRAINING and pipeline.trainings() == begun, said


def test_a_training_of_dmd_train_goes_on_from_a_moved_teacher(pipeline, monkeypatch):
    _verbs(pipeline, "regenerate", "train")
    _move_the_teacher(pipeline, monkeypatch)
    code, said, _ = pipeline(train__max_train_steps=8)
    assert code == Exit.OK and pipeline.latest() == pipeline.run, said


# ------------------------------------------------------------------------ single verbs


def test_a_training_without_pairs_is_taken_before_it_is_exported(pipeline):
    pipeline.base["train.lambda_reg"] = 0
    _verbs(pipeline, "train")
    code, said, ran = pipeline()
    assert code == Exit.OK and ran == FROM_TRAINING, said
    assert "train: begun, not finished" in said  # and train itself says that it is finished
    assert pipeline.latest() == pipeline.run and not (pipeline.run / "trainings").exists()


def test_a_training_from_another_teacher_is_not_taken(pipeline, monkeypatch):
    pipeline.base["train.lambda_reg"] = 0
    _verbs(pipeline, "train")
    _move_the_teacher(pipeline, monkeypatch)
    config = Path(str(pipeline.base["teacher.path"])) / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"beta_start": 0.001}))
    assert pipeline()[0] == Exit.OK
    assert pipeline.latest() != pipeline.run and len(pipeline.trainings()) == 1


def _verbs(pipeline, *names: str) -> None:
    words = [part for k, v in pipeline.base.items() for part in ("--set", f"{k}={v}")]
    for name in names:
        assert main([name, "--config", "tiny", *words]) == Exit.OK
    assert pipeline.verbs.take() == list(names)
