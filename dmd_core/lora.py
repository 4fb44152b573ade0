"""Low-rank adapters on a network through peft: train few weights, export them apart or fused.

peft is an optional dependency: extra "lora".
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers, recurse_remove_peft_layers
from safetensors.torch import save_file
from torch import nn

from dmd_core.noise import stable_seed

# Attention projections, as DMD2's LoRA run and most adapters for Stable Diffusion have them.
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class LoraError(ValueError):
    """Adapters that cannot be made."""


@dataclass(frozen=True)
class LoraSettings:
    """W + (alpha / rank) · B A on every layer whose name ends in one of `targets`."""

    rank: int = 64
    alpha: int = 64
    targets: tuple[str, ...] = DEFAULT_TARGETS


def check_lora(modules: Iterable[str], settings: LoraSettings) -> None:
    """Fail at the door: is peft there, and does every target name a layer of `modules`?"""
    if find_spec("peft") is None:
        raise LoraError(
            "train.trainable: lora needs peft; install the extra: pip install -e '.[lora]'"
        )
    names = [f".{name}" for name in modules]
    for target in settings.targets:
        if not any(name.endswith(f".{target}") for name in names):
            raise LoraError(
                f"train.lora_targets has {target!r}, which names no layer of the teacher's "
                f"network; expected names such as {', '.join(DEFAULT_TARGETS)}"
            )


def add_lora(network: nn.Module, settings: LoraSettings, seed: int) -> None:
    """Freeze `network` and add fresh adapters (B = 0: nothing changes yet), drawn from `seed`. On
    the meta device they have no values yet; `adapter_start` has them."""
    check_lora([name for name, _ in network.named_modules()], settings)
    from peft import LoraConfig, inject_adapter_in_model

    network.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets)
    )
    inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:  # in float32 whatever the base is in
            parameter.data = parameter.data.float()
            if not parameter.is_meta:
                parameter.data.copy_(adapter_start(name, tuple(parameter.shape), seed))


def adapter_start(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The first value of one adapter weight, keyed by its name: A uniform in ±1/√fan_in (peft's
    own start), B zero."""
    if ".lora_A." not in f".{name}":
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(stable_seed(seed, name))
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return (2 * torch.rand(shape, generator=generator) - 1) * bound


def fuse_lora(network: nn.Module) -> None:
    """Add the adapters to the weights they belong to, and remove them: the plain network again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    recurse_remove_peft_layers(network)
    del network.peft_config


def save_for_diffusers(network: nn.Module, pipeline_class: Any, model: str, folder: Path) -> None:
    """The adapters alone, as the pipeline's `load_lora_weights` reads them. `model`: the name of
    the network among its components."""
    from peft import get_peft_model_state_dict

    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    # With the settings: without them a reader takes alpha = rank.
    parts = {
        f"{model}_lora_layers": dict(weights),
        f"{model}_lora_adapter_metadata": _config(network).to_dict(),
    }
    pipeline_class.save_lora_weights(folder, **parts, safe_serialization=True)


def save_for_peft(network: nn.Module, folder: Path) -> None:
    """The adapters alone, as peft's `PeftModel.from_pretrained` puts them on a network: for
    pipelines that have no `load_lora_weights`."""
    from peft import get_peft_model_state_dict

    _config(network).save_pretrained(str(folder))
    weights = get_peft_model_state_dict(network)
    named = {f"base_model.model.{name}": w.contiguous() for name, w in weights.items()}
    save_file(named, folder / "adapter_model.safetensors")


def _config(network: nn.Module) -> Any:
    """The adapters' rank, alpha and targets, as peft describes them."""
    adapted: Any = network
    return adapted.peft_config["default"]
