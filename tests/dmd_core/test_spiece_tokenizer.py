"""A tokenizer that is published as `spiece.model` alone, as PixArt-Σ's is."""

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch

from dmd_core.teacher import TeacherError, check_teacher, load_teacher

SENTENCES = ["a cat and a dog", "a ship at sea", "the sun and a tree"] * 5


@pytest.fixture(scope="module")
def published(families, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "pixart"
    shutil.copytree(families.folder("pixart"), folder)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, model_type="unigram", vocab_size=40,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    tokenizer = folder / "tokenizer"
    shutil.rmtree(tokenizer)
    tokenizer.mkdir()
    (tokenizer / "spiece.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_its_prompts_are_encoded_as_sentencepiece_cuts_them(published):
    teacher = load_teacher(str(published))
    prompt = "a cat and a ship"
    model = sentencepiece.SentencePieceProcessor(str(published / "tokenizer" / "spiece.model"))
    expected = [*model.encode(prompt), 1]
    assert teacher.pipeline.tokenizer(prompt).input_ids == expected and len(expected) > 3
    cond = teacher.encode_prompts([prompt, "a dog"])
    assert cond.text is not None and cond.mask is not None
    assert cond.mask[0].sum() == len(expected)
    assert not torch.allclose(cond.text[0], cond.text[1])


def test_one_that_cannot_be_read_says_what_would(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "torn")
    (folder / "tokenizer" / "spiece.model").write_bytes(b"torn")
    check_teacher(str(folder))
    with pytest.raises(TeacherError, match=r"torn cannot be loaded: .*tokenizer/spiece.model: exp"):
        load_teacher(str(folder))
