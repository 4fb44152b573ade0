"""The card of an exported student says what makes a picture: its code, run as it stands, does."""

import re
from importlib import resources

import pytest
import torch
import yaml
from PIL import Image

from dmd_core.export import export_student
from dmd_core.families import FAMILIES
from dmd_core.model_card import Origin, card_credit, card_terms, model_card
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


def _front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_it_names_its_teacher_the_licence_the_credit_and_what_was_not_taken_along():
    family, size = FAMILIES["StableDiffusionPipeline"], (512, 512)
    origin = Origin(
        {"license": "other", "license_name": "a: name", "license_link": "LICENSE.md"},
        credit="Pictures: © somebody\n\n```\n---\n```",
        hub_id="org/name", revision="a" * 40, safety_checker=True,
    )  # fmt: skip
    card = model_card(family, {}, size, 1, False, dtype=torch.float16, origin=origin)
    assert _front(card) == {
        "library_name": "diffusers", "pipeline_tag": "text-to-image",
        "tags": ["distribution-matching-distillation", "few-step"],
        "license": "other", "license_name": "a: name", "license_link": "LICENSE.md",
        "base_model": "org/name",
    }  # fmt: skip
    assert f"`org/name` at commit `{'a' * 40}`" in card and "> Pictures: © somebody" in card
    assert "safety checker was not taken along" in card and "weights are float16." in card

    plain = model_card(family, {}, size, 1, False, dtype=torch.float32)
    assert not {"license", "base_model"} & _front(plain).keys()
    assert "## Teacher" not in plain and "safety checker" not in plain
    assert "weights are float32." in plain


def test_the_shipped_teacher_s_card_gives_its_licence_and_credit():
    text = resources.files("jobs").joinpath("assets/emoji-teacher/README.md").read_text("utf-8")
    assert card_terms(text) == card_terms(text.replace("\n", "\r\n")) == {"license": "cc-by-4.0"}
    credit = card_credit(text)
    assert credit.startswith("Pictures: Twemoji, ©") and "Figures" not in credit


@pytest.mark.parametrize(
    "front",
    ["license: [", "- mit", "license: {a: b}", "license: []", "license: 2024-99-99",
     "license: !!int ''", "license: !!bool x", "license: !!timestamp x", "? {}\n: 1", "[" * 5000,
     "\x00", ""],
)  # fmt: skip
def test_a_card_whose_front_matter_is_broken_says_nothing(front):
    assert card_terms(f"---\n{front}\n---\n# A teacher\n") == {}
    assert card_terms(front) == {} and card_credit(front) == ""
