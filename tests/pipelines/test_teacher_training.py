"""`dmd train-teacher` on real Ray Train: resumes bit for bit, writes a pipeline diffusers loads."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from dmd_core.checkpoint import Checkpoint, load_checkpoint
from dmd_core.gallery import load_gallery
from dmd_core.miniature import build_scheduler
from dmd_core.schedule import Schedule
from dmd_core.teacher import load_teacher
from dmd_core.teacher_training import LatentSet, sample_batch
from jobs.cli import main
from jobs.errors import Exit

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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_start_from_keeps_vae_and_vocabulary_and_resumes_from_its_checkpoint(tmp_path):
    _train(tmp_path / "first")
    start = tmp_path / "first" / "teacher"
    settings = (f"train_teacher.start_from={start}", "train_teacher.vae_steps=0")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    _train(straight, *settings)
    before, after = load_teacher(str(start)).pipeline, load_teacher(str(straight / "teacher"))
    after = after.pipeline
    for name, value in before.vae.state_dict().items():
        assert torch.equal(value, after.vae.state_dict()[name]), name
    assert before.vae.config.scaling_factor == after.vae.config.scaling_factor
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()
    assert before.tokenizer("red fox").input_ids == after.tokenizer("red fox").input_ids
    # Four steps away from the start, not from random weights.
    weight = "conv_in.weight"
    moved = after.unet.state_dict()[weight] - before.unet.state_dict()[weight]
    assert 0 < moved.abs().max() < 0.02

    card = (straight / "teacher" / "README.md").read_text()
    assert "- 4 VAE steps of 8 pictures, 4 UNet steps of 8." in card
    assert "- Then, with the VAE kept: 4 UNet steps of 8." in card

    shutil.copytree(straight, resumed)
    (resumed / CHECKPOINTS / "checkpoint-00000004" / "MANIFEST.json").unlink()
    shutil.rmtree(resumed / "teacher")
    # Where the run started from is of no more use to it.
    for part in ("unet", "text_encoder", "vae", "tokenizer"):
        shutil.rmtree(start / part)
    _train(resumed, *settings)
    expected, found = _checkpoint(straight), _checkpoint(resumed)
    assert expected.step == found.step == 4 and expected.state == found.state
    for part, tensors in expected.parts.items():
        for name, value in tensors.items():
            assert torch.equal(value, found.parts[part][name]), f"{part}.{name}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train_teacher.vae_steps=0"], "expected vae_steps 0 with start_from"),
        (["train_teacher.start_from=shipped:emoji"], "expected vae_steps 0 with start_from"),
        (
            ["train_teacher.start_from=no-such-folder", "train_teacher.vae_steps=0"],
            "no-such-folder has no model_index.json",
        ),
        (
            ["train_teacher.start_from=shipped:emoji", "train_teacher.vae_steps=0"],
            "unet has block_out_channels [96, 192]; this run expects [16, 32]",
        ),
    ],
)
def test_start_from_that_cannot_be_used_is_refused_at_the_door(tmp_path, capsys, settings, message):
    arguments = ["train-teacher", "--config", "tiny", "--set", f"run.dir={tmp_path / 'run'}"]
    arguments += [part for setting in settings for part in ("--set", setting)]
    assert main(arguments) in (Exit.USAGE, Exit.REFUSED)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_timestep_power_below_one_draws_noisy_times_more_often():
    schedule = Schedule.from_scheduler(build_scheduler())
    latents, ids = torch.zeros(1, 2, 4, 8, 8), torch.zeros(1, 24, dtype=torch.int64)
    data = LatentSet(latents, ids, np.ones(1))

    def times(power: float) -> torch.Tensor:
        return sample_batch(
            data,
            schedule,
            np.random.default_rng(0),
            batch_size=4096,
            caption_dropout=0.1,
            empty_ids=ids[0],
            timestep_power=power,
        ).t

    assert abs(float((times(1.0) < 500).float().mean()) - 0.5) < 0.01
    assert abs(float((times(0.5) < 500).float().mean()) - 0.25) < 0.01
    assert 0 <= int(times(0.5).min()) and int(times(0.5).max()) <= 999
