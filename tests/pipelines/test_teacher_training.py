"""`dmd train-teacher` on real Ray Train: resumes bit for bit, writes a pipeline diffusers loads."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline

from dmd_core.checkpoint import Checkpoint, load_checkpoint
from dmd_core.gallery import load_gallery
from jobs.cli import main

CHECKPOINTS = "teacher_checkpoints"


def _train(folder, *settings: str) -> None:
    arguments = ["train-teacher", "--config", "tiny", "--set", f"run.dir={folder}"]
    arguments += [part for setting in settings for part in ("--set", setting)]
    assert main(arguments) == 0


def _checkpoint(folder) -> Checkpoint:
    from pipelines.storage import open_store

    found = load_checkpoint(open_store(str(folder)).fs, str(folder / CHECKPOINTS))
    assert found is not None
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_training_resumes_bit_for_bit_and_writes_a_pipeline(tmp_path, capsys):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    _train(straight)
    shutil.copytree(straight, resumed)
    # As if the machine had died while the UNet was trained: back to step 6, no pipeline folder.
    (resumed / CHECKPOINTS / "checkpoint-00000008" / "MANIFEST.json").unlink()
    shutil.rmtree(resumed / "teacher")
    _train(resumed)
    expected, found = _checkpoint(straight), _checkpoint(resumed)
    assert expected.step == found.step == 8 and expected.state == found.state
    for part, tensors in expected.parts.items():
        for name, value in tensors.items():
            assert torch.equal(value, found.parts[part][name]), f"{part}.{name}"
    lines = (resumed / "teacher_metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))

    pipeline = DiffusionPipeline.from_pretrained(str(straight / "teacher"))
    picture = pipeline("fox", num_inference_steps=2).images[0]
    assert picture.size == (32, 32)
    gallery = load_gallery(str(straight / "teacher"))
    assert gallery is not None and len(gallery.captions) == 64
    card = (straight / "teacher" / "README.md").read_text()
    assert "CC-BY 4.0" in card and "seen top-1" in card

    capsys.readouterr()
    _train(straight)  # a finished training does nothing
