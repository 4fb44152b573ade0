"""A worker that starts again reads the prompts and pictures that its run was started with."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dmd_core.checkpoint import CheckpointError
from pipelines import training
from pipelines.config import PairsSection, StorageSection
from pipelines.pins import Pins
from pipelines.prompts import read_prompts
from pipelines.run_inputs import RunInputs
from pipelines.step_data import Progress
from pipelines.storage import open_store
from pipelines.streams import list_pictures, pictures_digest
from pipelines.train_config import TrainSection
from pipelines.workers import Group
from tests.dmd_core.family_calls import PROMPTS
from tests.pipelines.dmd_runs import write_pictures

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(families, tmp_path):
    """Of a DMD2 run without pairs, as `train_loop` takes it."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    pictures = write_pictures(tmp_path / "pictures", PROMPTS)
    section = TrainSection.model_validate(
        {"lambda_reg": 0, "regression_batch_size": 0, "train_batch_size": 2, "gan_weight": 5e-3,
         "gan_fake_weight": 1e-2, "guidance_scale": 1.0, "real_pictures": pictures,
         "threads_per_worker": 1}
    )  # fmt: skip
    pins = Pins(
        None, {}, (str(prompts),), prompts_digest=read_prompts(str(prompts)).digest,
        pictures_digest=pictures_digest(list_pictures(open_store(pictures))),
    )  # fmt: skip
    pairs = PairsSection(solver="edm_euler", steps=3, guidance_scale=1.0)
    return {
        "train": section.model_dump(), "pairs": pairs.model_dump(), "seed": 3,
        "storage": StorageSection().model_dump(), "dir": str(tmp_path / "run"),
        "root": str(tmp_path / "set"), "teacher": families.folder("edm"), "pins": asdict(pins),
    }  # fmt: skip


def _prompts_grow(folder: Path) -> str:
    with open(folder / "prompts.txt", "a") as file:
        file.write("\nanother prompt")
    return "prompts.txt"


def _a_picture_goes(folder: Path) -> str:
    (folder / "pictures" / "0.png").rename(folder / "pictures" / "00.png")
    (folder / "pictures" / "metadata.jsonl").unlink()
    return "pictures"


def test_what_is_as_it_was_is_read(config):
    inputs = RunInputs(config, Group(0, 1))
    _, keys = inputs.section.plan()[0]
    drawn = inputs.source(timesteps=1).draw(Progress(), keys, None)
    pictures = drawn.unpaired[0].pictures
    assert pictures is not None and pictures.x.shape == (2, *inputs.shape)


def test_prompts_are_encoded_in_the_precision_of_the_networks(config):
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        config["train"]["mixed_precision"] = precision
        assert RunInputs(config, Group(0, 1)).teacher.encoder.compute_dtype == dtype


@pytest.mark.parametrize(
    ("teacher", "precision", "expected"),
    [
        ("sharded", "bf16", "bfloat16"),
        ("replicated", "bf16", "bfloat16"),
        ("offload", "no", "float32"),
    ],
)
def test_a_teacher_beside_a_training_in_bfloat16_makes_its_sample_pictures_in_it(
    config, teacher, precision, expected
):
    config["train"]["mixed_precision"] = precision
    config["train"]["parallel"]["teacher"] = teacher
    assert RunInputs(config, Group(0, 1)).sample_pictures._section.compute_dtype == expected


@pytest.mark.parametrize("change", [_prompts_grow, _a_picture_goes])
def test_what_changed_is_refused(config, tmp_path, change):
    inputs = RunInputs(config, Group(0, 1))
    name = change(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{name} changed since .*run was started; put back"):
        inputs.source(timesteps=1)


def test_what_another_worker_found_changed_is_refused_here_too(config, monkeypatch):
    found = iter((1, 0))  # its prompts, and not its pictures

    def other_worker_found(total):
        total += next(found)

    monkeypatch.setattr(torch.distributed, "all_reduce", other_worker_found)
    with pytest.raises(CheckpointError, match=r"prompts\.txt changed since"):
        RunInputs(config, Group(0, 2)).source(timesteps=1)


def test_the_training_ends_at_once(config, tmp_path, monkeypatch):
    """The error goes to the board and the loop returns: Ray Train has no failure to try again."""
    failures = []
    board = SimpleNamespace(fail=SimpleNamespace(remote=failures.append))
    monkeypatch.setattr(training.Group, "here", lambda: Group(0, 1))
    monkeypatch.setattr(training.ray, "get", lambda value: value)
    _prompts_grow(tmp_path)
    training.train_loop(config | {"board": board, "fence": 1})
    (failure,) = failures
    assert "prompts.txt changed since" in str(failure)
