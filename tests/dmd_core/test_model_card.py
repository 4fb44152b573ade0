"""The card of an exported student says what makes a picture: its code, run as it stands, does."""

import re

import pytest
import torch
from PIL import Image

from dmd_core.export import export_student
from dmd_core.plain_call import call_arguments, family_of_pipeline, student_call
from dmd_core.teacher import load_teacher
from tests.dmd_core.family_calls import PIXELS, plain

NAMES = ["sd", "sd3 without t5", "flux", "pixart", "edm", "unconditional"]


@pytest.mark.parametrize("name", NAMES)
def test_its_code_makes_a_picture_of_the_size_that_was_trained(
    families, tmp_path, name, monkeypatch
):
    size = (None, None) if name in PIXELS else (24, 16)  # no pipeline's default
    teacher = load_teacher(families.folder(name), size=size)
    folder = tmp_path / "student"
    export_student(
        teacher, dict(teacher.model.named_parameters()), str(folder),
        timesteps=(999,), card={}, dtype=torch.float32,
    )  # fmt: skip
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("path/to/this/folder", str(folder)), {})
    (picture,) = tmp_path.glob("*.png")
    assert Image.open(picture).size == teacher.size[::-1]


def test_pixart_s_prompt_is_read_as_it_was_trained_with(families, monkeypatch):
    """Its pipeline would clean it: lower case, no links or punctuation, where bs4 is installed."""
    pipeline = plain(families.folder("pixart"))
    family, size, asked = family_of_pipeline(pipeline), (16, 16), []

    def as_it_is(text, clean_caption=False):
        asked.append(clean_caption)
        return [text] if isinstance(text, str) else text

    monkeypatch.setattr(pipeline, "_text_preprocessing", as_it_is)
    arguments = call_arguments(family, ["A Cat"], None, torch.zeros(1, 4, 8, 8), size)
    pipeline(**arguments, num_inference_steps=1, guidance_scale=0.0)
    exec(student_call(family, "A Cat", size, 1), {"pipe": pipeline})
    assert asked == [False, False]
