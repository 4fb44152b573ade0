"""What a student's card says of its teacher, wherever that came from."""

import json
from pathlib import Path

import pytest
import torch

from dmd_core.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from dmd_core.model_card import UNKNOWN, Origin
from pipelines import student_export
from pipelines.hub import HubError
from pipelines.storage import open_store
from pipelines.student_export import AVERAGE, LAST, load_student, teacher_origin, weights_kind
from pipelines.teacher_source import TeacherSource

CARD = b"\xef\xbb\xbf---\nlicense: cc-by-4.0\n---\n# A teacher\n\n## Data and credit\n\nBy \xff.\n"
FROM_CARD = Origin({"license": "cc-by-4.0"}, "By \N{REPLACEMENT CHARACTER}.")
ON_HUB = TeacherSource("org/name", revision="a" * 40)


@pytest.fixture
def teacher(tmp_path) -> Path:
    """A folder with the index of a Stable Diffusion, whose safety checker is left out."""
    _write_index(tmp_path, [None, None])
    return tmp_path


def _write_index(folder: Path, checker: object) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "safety_checker": checker}
    (folder / "model_index.json").write_text(json.dumps(index))


def test_a_folder_s_card_gives_licence_and_credit(teacher):
    assert teacher_origin(str(teacher), str(teacher)) == UNKNOWN
    (teacher / "README.md").write_bytes(CARD)
    assert teacher_origin(str(teacher), str(teacher)) == FROM_CARD
    single_file = TeacherSource(str(teacher), config="org/other@" + "a" * 40)
    assert teacher_origin(single_file.url, str(teacher)) == UNKNOWN


def test_a_bucket_s_card_is_read_where_it_lies(teacher, s3_store, s3_options):
    s3_store.fs.pipe_file(s3_store.path("README.md"), CARD)
    assert teacher_origin(s3_store.url, str(teacher), s3_options) == FROM_CARD


def test_a_hub_s_model_is_the_base_model_even_where_its_card_is_out_of_reach(teacher, monkeypatch):
    named = {"hub_id": "org/name", "revision": "a" * 40}
    (teacher / "README.md").write_bytes(CARD)
    monkeypatch.setattr(student_export, "hub_file", lambda *asked: teacher / asked[2])
    found = teacher_origin(ON_HUB.url, str(teacher))
    assert found == Origin(FROM_CARD.terms, FROM_CARD.credit, **named)

    def out_of_reach(*asked):
        raise HubError("no network")

    monkeypatch.setattr(student_export, "hub_file", out_of_reach)
    assert teacher_origin(ON_HUB.url, str(teacher)) == Origin(**named)


def test_a_safety_checker_is_told_of(teacher):
    _write_index(teacher, ["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert teacher_origin(str(teacher), str(teacher)) == Origin(safety_checker=True)


def test_of_a_checkpoint_only_what_is_exported_is_read(tmp_path):
    store = open_store(str(tmp_path))
    parts = {name: {"w": torch.ones(2)} for name in ("generator", "ema", "fake")}
    for step, kept in ((1, parts), (2, {"generator": parts["generator"]})):
        save_checkpoint(store.fs, store.path("checkpoints"), Checkpoint(step, kept, {}))
    averaged, last = (load_student(store, "checkpoints", step) for step in (1, 2))
    assert averaged.parts.keys() == {"ema"} and weights_kind(averaged) == AVERAGE
    assert last.parts.keys() == {"generator"} and weights_kind(last) == LAST
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; it has 1, 2"):
        load_student(store, "checkpoints", 3)
