"""Low-rank adapters on a network through peft: train few weights, export them apart or fused.

peft is an optional dependency: extra "lora".
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
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
    from peft import LoraConfig

    network.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets)
    )
    network.add_adapter(config)  # type: ignore[operator]
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
    network.fuse_lora()  # type: ignore[operator]
    network.unload_lora()  # type: ignore[operator]


def lora_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters alone, by the names that diffusers' `load_lora_weights` reads."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    return convert_state_dict_to_diffusers(get_peft_model_state_dict(network))


def lora_config(network: nn.Module) -> dict[str, Any]:
    """The adapters' rank, alpha and targets, as peft describes them."""
    adapted: Any = network
    return adapted.peft_config["default"].to_dict()
