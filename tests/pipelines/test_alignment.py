"""Station 9: the CLIP score of teacher and student, from the files of their pictures."""

import shutil

import numpy as np
import pytest
import torch

from dmd_core.clip_score import ClipError, ClipScorer, clip_revision
from pipelines import alignment as clip
from pipelines.alignment import alignment, clip_folder
from pipelines.config import EvaluateSection, PairsSection, StorageSection
from pipelines.hub import HubError
from pipelines.images import SamplerPool, image_folders, make_images
from pipelines.report_text import tiles
from pipelines.storage import open_store
from pipelines.stored_images import open_images
from pipelines.systems import STUDENT, TEACHER, Networks, SamplingPlan, few_step_name
from pipelines.unit import Unit
from tests.tiny_clip import save_tiny_clip

PROMPTS = tuple(f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("fox", "tree"))
FEW = few_step_name(1)


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def networks(tiny_teacher_dir) -> Networks:
    return Networks(tiny_teacher_dir, tiny_teacher_dir, StorageSection(), threads=1)


@pytest.fixture(scope="module")
def sampled(networks, tmp_path_factory):
    """(folder, files) of the teacher in four steps and in one."""
    torch.set_num_threads(1)
    evaluate = EvaluateSection(few_steps=(1,), batch_size=4)
    plan = SamplingPlan.from_sections(evaluate, PairsSection(steps=4))
    files = image_folders(
        plan, PROMPTS, [TEACHER, FEW], teacher_revision="", student_revision="", mean=None
    )
    folder = open_store(str(tmp_path_factory.mktemp("evaluation")))
    make_images(folder, files, PROMPTS, plan, networks, pool=SamplerPool(actors=0))
    return folder, files


def _alignment(clip_dir: str, networks, folder, files, **how):
    pool = SamplerPool(actors=0)
    return alignment(clip_dir, networks, folder, files, unit=Unit(0.95), pool=pool, **how)


def test_a_student_like_the_teacher_has_the_same_score(networks, sampled, clip_dir):
    folder, files = sampled
    same = {TEACHER: files[TEACHER], STUDENT: files[TEACHER]}
    found = _alignment(clip_dir, networks, folder, same)
    assert found["clip_score"][STUDENT] == found["clip_score"][TEACHER]
    assert found["clip_score_difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["clip_revision"] == clip_revision(clip_dir) and found["clip_model"] == "tiny"


def test_another_student_has_its_own(networks, sampled, clip_dir):
    folder, files = sampled
    other = {TEACHER: files[TEACHER], STUDENT: files[FEW]}
    found = _alignment(clip_dir, networks, folder, other)
    images = [open_images(folder, path).first(len(PROMPTS)) for path in other.values()]
    teacher, student = (ClipScorer(clip_dir)(one.pictures, one.prompts) for one in images)
    assert found["clip_score"][TEACHER]["value"] == pytest.approx(teacher.mean())
    difference = found["clip_score_difference"]
    assert difference["value"] == pytest.approx(np.mean(student - teacher)) != 0
    assert difference["low"] < difference["value"] < difference["high"]


def test_a_kill_loses_no_score_that_is_kept(networks, sampled, clip_dir, tmp_path, monkeypatch):
    folder, files = open_store(str(tmp_path)), sampled[1]
    for path in files.values():
        shutil.copytree(sampled[0].path(path), folder.path(path))
    other = {TEACHER: files[TEACHER], STUDENT: files[FEW]}
    seen, whole = [], clip._clip

    def scorer(*given):
        network = whole(*given)

        def scores(images):
            seen.append(images.folder)
            if seen == list(other.values()):
                raise KeyboardInterrupt
            return network(images)

        return scores

    monkeypatch.setattr(clip, "_clip", scorer)
    with pytest.raises(KeyboardInterrupt):
        _alignment(clip_dir, networks, folder, other)
    told = []
    found = _alignment(
        clip_dir, networks, folder, other, on_progress=lambda *count: told.append(count)
    )
    assert seen == [files[TEACHER], files[FEW], files[FEW]]  # the teacher was seen once
    assert told[-1] == (8, 8)
    assert _alignment(clip_dir, networks, folder, other) == found and len(seen) == 3
    assert found == _alignment(clip_dir, networks, sampled[0], other)


def test_without_a_model_the_result_says_so(networks, sampled):
    folder, files = sampled
    found = alignment("", networks, folder, files, unit=Unit(0.95), pool=SamplerPool())
    assert found == {"clip_score": "not measured: evaluate.clip_model names no CLIP model"}


def test_a_model_that_is_not_there_is_refused_before_sampling(tmp_path):
    with pytest.raises(ClipError, match=r"evaluate\.clip_model /nowhere does not"):
        clip_folder("/nowhere", StorageSection())
    with pytest.raises(HubError, match="expected openai/clip-vit-base-patch32@<commit>"):
        clip_folder("openai/clip-vit-base-patch32", StorageSection())


def test_the_report_shows_both_scores():
    def share(value: float) -> dict:
        return {"value": value, "low": value - 1, "high": value + 1}

    system = {"network_evaluations": 1, "kid": share(0.0), "retrieval": None}
    metrics = {
        "reference": "teacher_again",
        "systems": dict.fromkeys((TEACHER, STUDENT, "start"), system),
        "timing": {"speed_up": 2.0, "device": "cpu", "threads": 1},
        "alignment": {
            "clip_score": {TEACHER: share(32.2), STUDENT: share(32.0)},
            "clip_score_difference": share(-0.2),
        },
    }
    (tile,) = (tile for tile in tiles(metrics) if "CLIP" in tile["label"])
    assert tile["value"] == "32.0"
    assert tile["note"] == "teacher 32.2, difference -0.2 ± 1.0"
