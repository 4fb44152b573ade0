"""Sample pictures of a run: a few samples at a time, in the precision of the pairs."""

import numpy as np
import pytest
import torch

from dmd_core.student import Student
from pipelines.config import PairsSection, StorageSection
from pipelines.following import PairVersions
from pipelines.pins import Pins
from pipelines.sample_pictures import SamplePictures
from pipelines.storage import open_store

WORDS = ("cat", "dog", "ship", "sun", "tree")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def shown(families, tmp_path):
    def make(at_once: int, name: str = "sd", **settings: object) -> SamplePictures:
        section = PairsSection.model_validate(
            {"solver": "dpmsolver++", "steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16}
            | settings
        )
        versions = PairVersions(
            open_store(str(tmp_path), StorageSection()), Pins(None, {}, ("prompts.txt",)), 3
        )
        return SamplePictures(
            families.teacher(name), section, versions, WORDS, count=5, seed=3, at_once=at_once
        )

    return make


def _student(teacher) -> Student:
    return Student(teacher.denoiser(), (999, 499))


def _rows(model: torch.nn.Module, call):
    """What `call` returns, and the rows of each of its passes."""
    rows: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        return call(), rows
    finally:
        hook.remove()


def test_no_pass_has_more_samples_than_a_training_s(families, shown):
    teacher = families.teacher("sd")
    whole, _ = _rows(teacher.model, lambda: shown(5).rows(_student(teacher)))
    pieces, rows = _rows(teacher.model, lambda: shown(2).rows(_student(teacher)))
    # The teacher's two guided steps, then the student's two.
    assert rows == [4, 4, 4, 4, 2, 2, *(2, 2), *(2, 2), *(1, 1)]
    for one, other in zip(whole, pieces, strict=True):
        assert one.shape == (5, 16, 16, 3)
        assert np.abs(one.astype(int) - other).max() <= 1


def test_prompts_are_encoded_before_the_training_begins(families, shown, monkeypatch):
    """Its data thread uses the tokenizer from then on."""
    teacher, pictures = families.teacher("sd"), shown(2)
    pictures.prepare()
    monkeypatch.setattr(type(teacher), "encode_prompts", lambda *_: pytest.fail("encoded later"))
    assert len(pictures.rows(_student(teacher))) == 2


def test_the_teacher_s_are_made_in_the_precision_of_pairs(families, shown, monkeypatch):
    teacher, asked = families.teacher("sd"), []
    network = type(teacher).network
    monkeypatch.setattr(
        type(teacher), "network", lambda self, dtype: asked.append(dtype) or network(self, dtype)
    )
    shown(5, compute_dtype="bfloat16").rows(_student(teacher))
    assert asked == [torch.bfloat16]
