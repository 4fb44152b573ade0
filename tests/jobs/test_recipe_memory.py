"""The recipes for GPUs fit the GPUs they name, by the published networks' figures."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import jobs
from dmd_core.edm_training import build_unet
from dmd_core.pass_memory import condition_bytes, head_parameters, pass_memory, without_memory
from jobs.config import load_recipe, shipped_recipes
from pipelines.memory_plan import GIB, GPUS, MemoryPlan, training_memory
from pipelines.network_sizes import _blocks
from pipelines.pixel_teacher import pixel_size
from pipelines.weights import Weights
from tests.pipelines.published_networks import PUBLISHED

ON_GPUS = [name for name in shipped_recipes() if load_recipe(name, []).train.use_gpu]


def _plan(name: str, **changes) -> MemoryPlan:
    section = load_recipe(name, []).train.model_copy(update=changes)
    network = PUBLISHED[name]
    return training_memory(
        network.sizes(gan=section.uses_gan), section, lambda *_: network.passes,
        distilled=network.config.get("guidance_embeds", False),
    )  # fmt: skip


@pytest.mark.parametrize("name", ON_GPUS)
def test_it_fits_the_gpu_that_it_names(name):
    text, plan = (Path(jobs.__file__).parent / "recipes" / f"{name}.yaml").read_text(), _plan(name)
    section = load_recipe(name, []).train
    ((count, gpu),) = re.findall(r"# (\w+) GPUs? of (\d+ GB)", text)
    assert {"One": 1, "Eight": 8}[count] == section.most_workers
    assert plan.complete and plan.fits(GPUS[gpu])
    assert f"{plan.total / GIB:.0f} GiB" in re.sub(r"\n\s*#", "", text)


def test_flux_on_sixteen_cards():
    """As its comment says."""
    text = (Path(jobs.__file__).parent / "recipes" / "flux.yaml").read_text()
    said = re.findall(r"\(num_workers: 16\) (\d+) GiB", text)
    plan = _plan("flux", num_workers=16)
    assert plan.fits(GPUS["80 GB"]) and said == [f"{plan.total / GIB:.0f}"]


@pytest.mark.parametrize("name", ["cifar10", "cifar10-dmd2"])
def test_the_papers_batches_at_once_would_not_fit(name):
    assert not _plan(name, micro_batch_size=None).fits(GPUS["80 GB"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_GPUS)
def test_the_figures_are_those_of_the_published_networks(name):
    section, network = load_recipe(name, []).train, PUBLISHED[name]
    model = without_memory(network.name, network.config)
    shapes = {key: tuple(weight.shape) for key, weight in model.named_parameters()}
    weights = Weights("", shapes)
    assert network.parameters == weights.parameters
    assert network.matrices == weights.matrices
    assert network.block == max(_blocks(weights).values())
    assert network.head == head_parameters(model, network.shape)
    assert network.adapters == weights.adapters(section.lora_rank, section.lora_targets)
    assert network.condition == condition_bytes(model)
    assert network.passes == pass_memory(
        network.name, network.config, network.shape,
        bf16=section.mixed_precision == "bf16",
        checkpointing=section.parallel.gradient_checkpointing,
    )  # fmt: skip


def test_the_pixel_network_is_the_one_that_is_trained():
    size = pixel_size(load_recipe("cifar10", []).train_teacher)
    with torch.device("meta"):
        ours = build_unet(size)
    published = PUBLISHED["cifar10"]
    theirs = without_memory(published.name, published.config)
    assert _settings(ours) == _settings(theirs)


def _settings(network: Any) -> dict[str, Any]:
    return {key: value for key, value in network.config.items() if not key.startswith("_")}
