"""Station 9: the CLIP score is transformers' own, however many pictures, without torchvision."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from dmd_core.clip_score import ClipError, ClipScorer, clip_revision
from tests.tiny_clip import save_tiny_clip

PROMPTS = ("a red fox", "green apple", "flag of nowhere", "a blue whale", "woman astronaut" * 30)


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def pictures() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (len(PROMPTS), 48, 64, 3), dtype=np.uint8)


def test_it_is_transformers_own_score(clip_dir, pictures):
    """CLIPModel's logits are the cosine times its learned scale."""
    model = CLIPModel.from_pretrained(clip_dir)
    inputs = CLIPProcessor.from_pretrained(clip_dir)(
        text=list(PROMPTS),
        images=[Image.fromarray(one) for one in pictures],
        padding=True,
        truncation=True,
        max_length=16,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    found = ClipScorer(clip_dir)(pictures, PROMPTS)
    np.testing.assert_allclose(found, 100 * logits.diagonal().numpy(), atol=1e-4)
    assert found.std() > 0.1  # the scores differ, so a wrong pairing would show


def test_batches_do_not_matter(clip_dir, pictures):
    scorer = ClipScorer(clip_dir)
    whole = scorer(pictures, PROMPTS, batch_size=5)
    np.testing.assert_allclose(scorer(pictures, PROMPTS, batch_size=2), whole, atol=1e-4)


def test_as_many_prompts_as_pictures(clip_dir, pictures):
    with pytest.raises(ValueError, match="5 pictures, 2 prompts"):
        ClipScorer(clip_dir)(pictures, PROMPTS[:2])


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ("config.json", r"no readable config\.json"),
        ("model.safetensors", r"no \*\.safetensors"),
        ("preprocessor_config.json", "no preprocessor_config.json"),
        ("tokenizer*.json", r"no tokenizer\*\.json"),
    ],
)
def test_what_is_missing_is_named(clip_dir, tmp_path, removed, said):
    folder = tmp_path / "clip"
    shutil.copytree(clip_dir, folder)
    for file in folder.glob(removed):
        file.unlink()
    with pytest.raises(ClipError, match=said):
        ClipScorer(str(folder))


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ClipError, match="of type 'siglip'; expected clip"):
        ClipScorer(str(tmp_path))


def test_other_weights_are_another_revision(clip_dir, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(clip_dir, folder)
    assert clip_revision(str(folder)) == clip_revision(clip_dir)
    (folder / "model.safetensors").write_bytes(b"x")
    assert clip_revision(str(folder)) != clip_revision(clip_dir)
