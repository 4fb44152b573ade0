"""The CIFAR-10 teacher: the loss and preconditioning of EDM, and its training on real Ray Train."""

import json
import shutil
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline

from dmd_core.checkpoint import load_checkpoint
from dmd_core.condition import Condition
from dmd_core.edm_training import (
    SIGMA_DATA,
    EdmBatch,
    PixelSize,
    build_pipeline,
    build_unet,
    edm_loss,
    ema_halflife,
    sample_batch,
)
from dmd_core.noise import sample_noise
from dmd_core.schedule import Schedule
from dmd_core.teacher import load_teacher
from jobs.cli import main
from jobs.config import load_recipe
from jobs.errors import Exit
from pipelines.pixel_teacher import pixel_size
from pipelines.storage import open_store
from tests.pipelines import small_cifar10 as small

SIZE = PixelSize(32, (8, 16), 1, (1,), dropout=0.0, classes=10, no_class=True)


def _batch(sigma: torch.Tensor) -> EdmBatch:
    generator = torch.Generator().manual_seed(0)
    shape = (len(sigma), 3, 32, 32)
    x0 = torch.rand(shape, generator=generator) * 2 - 1
    eps = torch.randn(shape, generator=generator)
    return EdmBatch(x0, eps, sigma, torch.arange(len(sigma)) % 11)


def test_the_loss_is_lambda_times_the_error_of_the_denoiser_that_samples():
    """On σ of the sampler's own grid: what is trained is what `Teacher.denoiser` evaluates."""
    torch.manual_seed(0)
    unet = build_unet(SIZE).eval()
    schedule = Schedule.from_scheduler(build_pipeline(unet).scheduler)
    t = torch.tensor([10, 300, 500, 700, 990])
    sigma = schedule.sigmas[t]
    batch = _batch(sigma.float())
    x_t = schedule.diffuse(batch.x0, batch.eps, t)
    with torch.no_grad():
        output = unet(
            schedule.network_input(x_t, t),
            schedule.network_time(t),
            class_labels=batch.labels,
            return_dict=False,
        )[0]
        loss = edm_loss(unet, batch)
    x0 = schedule.x0_from_output(output, x_t, t)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    expected = (weight.view(-1, 1, 1, 1) * (x0 - batch.x0).double().square()).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_a_perfect_network_has_no_loss_and_a_silent_one_has_about_one():
    """EDM's c_skip and c_out make F's target of unit variance for data of σ_data."""
    sigma = torch.logspace(-2, 1.5, 64)
    batch = _batch(sigma)
    batch = EdmBatch(batch.eps.flip(0) * SIGMA_DATA, batch.eps, sigma, batch.labels)

    def silent(x, time, class_labels, return_dict):
        return (torch.zeros_like(x),)

    def perfect(x, time, class_labels, return_dict):
        assert torch.allclose(time, sigma.log() / 4)
        total = (sigma**2 + SIGMA_DATA**2).view(-1, 1, 1, 1)
        x_t, s = x * total.sqrt(), sigma.view(-1, 1, 1, 1)
        return ((batch.x0 - SIGMA_DATA**2 / total * x_t) * total.sqrt() / (s * SIGMA_DATA),)

    assert float(edm_loss(silent, batch)) == pytest.approx(1.0, abs=0.02)  # type: ignore[arg-type]
    assert float(edm_loss(perfect, batch)) < 1e-6  # type: ignore[arg-type]


def test_batches_have_log_normal_noise_mirrors_and_dropped_classes():
    pictures = np.zeros((4, 32, 32, 3), np.uint8)
    pictures[:, :, 0] = 255  # the left column is white
    batch = sample_batch(
        pictures, np.array([0, 1, 2, 3]), np.random.default_rng(0),
        batch_size=4000, class_dropout=0.1, no_class=10, p_mean=-1.2, p_std=1.2,
    )  # fmt: skip
    z = np.sort((batch.sigma.log().numpy() + 1.2) / 1.2)
    cdf = np.array([NormalDist().cdf(value) for value in z])
    assert np.abs(cdf - (np.arange(len(z)) + 0.5) / len(z)).max() < 0.01  # Kolmogorov-Smirnov
    left = (batch.x0[:, 0, 0, 0] == 1.0).float().mean()
    assert abs(float(left) - 0.5) < 0.03
    assert abs(float((batch.labels == 10).float().mean()) - 0.1) < 0.02
    assert set(batch.labels.tolist()) == {0, 1, 2, 3, 10}
    assert abs(float(batch.eps.std()) - 1) < 0.01 and (pictures[:, :, 1:] == 0).all()


def test_the_average_forgets_the_start_soon():
    assert ema_halflife(32, 10_000) == pytest.approx(1.6)
    assert ema_halflife(10**9, 10_000) == 10_000


def test_the_full_recipes_network_has_the_papers_size():
    """EDM's DDPM++ for CIFAR-10 has 55.7 M parameters; diffusers' blocks differ a little."""
    section = load_recipe("cifar10", []).train_teacher
    with torch.device("meta"):
        count = sum(p.numel() for p in build_unet(pixel_size(section)).parameters())
    assert 50e6 < count < 65e6


def test_classes_change_the_picture():
    torch.manual_seed(0)
    unet = build_unet(SIZE).eval()
    x, time = torch.randn(1, 3, 32, 32).expand(2, -1, -1, -1), torch.zeros(2)
    one, other = unet(x, time, class_labels=torch.tensor([3, 10]), return_dict=False)[0]
    assert (one - other).abs().max() > 1e-4


# ---------------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("cifar10")
    small.write_small(open_store(str(folder / "data")), folder)
    return str(folder / "data")


def _recipe(folder: Path, data: str, **pixel) -> str:
    section = {
        "data": "cifar10", "unet_steps": 4, "unet_batch_size": 8, "lr_warmup_steps": 1,
        "threads_per_worker": 1, "checkpointing_steps": 2, "logging_steps": 1,
        "pixel": {"path": data, "channels": [8, 16], "layers_per_block": 1,
                  "class_dropout": 0.2, "dropout": 0.3, "ema_halflife_samples": 20} | pixel,
    }  # fmt: skip
    path = folder.parent / f"{folder.name}.yaml"
    recipe = {"run": {"dir": str(folder)}, "ray": {"num_cpus": 2}, "train_teacher": section}
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def _train(folder: Path, data: str) -> None:
    assert main(["train-teacher", "--config", _recipe(folder, data)]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_training_resumes_bit_for_bit_and_writes_what_diffusers_and_we_load(
    tmp_path, data_dir, capfd
):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    _train(straight, data_dir)
    shutil.copytree(straight, resumed)
    # As if the machine had died at step 3: back to step 2, no pipeline folder.
    (resumed / "teacher_checkpoints" / "checkpoint-00000004" / "MANIFEST.json").unlink()
    shutil.rmtree(resumed / "teacher")
    _train(resumed, data_dir)
    expected, found = (
        load_checkpoint(open_store(str(run)).fs, str(run / "teacher_checkpoints"))
        for run in (straight, resumed)
    )
    assert expected is not None and found is not None and expected.step == found.step == 4
    for part, tensors in expected.parts.items():
        for name, value in tensors.items():
            assert torch.equal(value, found.parts[part][name]), f"{part}.{name}"
    assert not torch.equal(
        expected.parts["ema"]["conv_in.weight"], expected.parts["model"]["conv_in.weight"]
    )

    teacher = load_teacher(str(straight / "teacher"))
    for name, value in expected.parts["ema"].items():
        assert torch.equal(teacher.model.state_dict()[name], value), name
    eps = sample_noise([1, 2], teacher.latent_shape())
    assert eps.shape == (2, 3, 32, 32)
    cond: Condition = teacher.encode_prompts(["truck", "3"])
    assert cond.labels is not None and cond.labels.tolist() == [9, 3]
    pipeline = DiffusionPipeline.from_pretrained(str(straight / "teacher"))
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(batch_size=2, class_labels=[9, 3], num_inference_steps=1, output_type="np")
    assert pictures.images.shape == (2, 32, 32, 3)
    assert json.loads((straight / "teacher" / "classes.json").read_text())[3] == "cat"
    card = (straight / "teacher" / "README.md").read_text()
    assert "4 steps of 8 pictures" in card and "no formal licence" in card
    assert (straight / "teacher" / "samples.png").is_file()
    capfd.readouterr()
    _train(straight, data_dir)
    assert "nothing to do" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train_teacher.vae_steps=7"], "vae_steps: not for data: cifar10"),
        (["train_teacher.data=emoji"], "pixel: not for data: emoji"),
        (["train_teacher.pixel.attention_levels=[2]"], "expected indices into channels, 0 to 1"),
        (["train_teacher.pixel.path=no-such-folder"], "expected a folder that `dmd data cifar10"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_the_door(
    tmp_path, data_dir, capsys, settings, message
):
    arguments = ["train-teacher", "--config", _recipe(tmp_path / "run", data_dir)]
    arguments += [part for setting in settings for part in ("--set", setting)]
    assert main(arguments) in (Exit.USAGE, Exit.REFUSED)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
