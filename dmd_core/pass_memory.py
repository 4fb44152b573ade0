"""What one pass through a network keeps in memory, found without memory: the true network runs on
tensors that have shapes and no values, and what is alive at once is added up. Likewise how large
its condition is, and a discriminator's head on it.

Convolutions' own work space and what an allocator wastes are not seen; the memory plan adds them.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import diffusers
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmd_core.condition import Condition
from dmd_core.diffusers_networks import DiffusersNetwork, middle_of
from dmd_core.fake_score import DiscriminatorHead

_MANY = 8  # samples of the second of two passes, between which the numbers are linear
# Tokens of a prompt that a pipeline gives a network of the class.
_TEXT_TOKENS = {"SD3Transformer2DModel": 333, "FluxTransformer2DModel": 512}
_TEXT_TOKENS |= {"PixArtTransformer2DModel": 300}
_DRIVEN = ("UNet2DModel", "UNet2DConditionModel", *_TEXT_TOKENS)
# Where a network cannot run without values: an operator that asks for one or is not known (torch's
# errors for it are RuntimeErrors), a tensor made outside of the mode, a call with other arguments.
_UNPLAYABLE = (RuntimeError, AssertionError, TypeError)


class UnknownNetworkError(ValueError):
    """A network whose passes cannot be played through."""


@dataclass(frozen=True)
class PassMemory:
    """Bytes beside the weights, of 1 and of 8 samples at once: `held` by a forward pass for its
    backward pass; `peak` of both, with all gradients; `frozen`: peak of a pass without gradient."""

    held: tuple[int, int]
    peak: tuple[int, int]
    frozen: tuple[int, int]

    def held_by(self, samples: float) -> float:
        return _between(self.held, samples)

    def peak_of(self, samples: float) -> float:
        """Never too little between 1 and 8 samples: it is the larger of gradients and what a pass
        holds. Beyond, it grows as what is held."""
        if samples <= _MANY:
            return _between(self.peak, samples)
        return self.peak[1] + self.held_by(samples) - self.held[1]

    def frozen_of(self, samples: float) -> float:
        return _between(self.frozen, samples)


def pass_memory(
    class_name: str,
    config: Mapping[str, Any],
    shape: tuple[int, ...],
    *,
    bf16: bool = False,
    checkpointing: bool = False,
    text_tokens: int = 77,
) -> PassMemory:
    """Of a diffusers network of this class and configuration, on samples of `shape` (C,h,w).

    Raises `UnknownNetworkError` for one that this version does not drive, or that does not run on
    tensors without values.
    """
    cls, tokens = _class_of(class_name), _TEXT_TOKENS.get(class_name, text_tokens)
    try:
        return _played(cls, config, shape, tokens, bf16=bf16, checkpointing=checkpointing)
    except _UNPLAYABLE as error:
        reason = f"{type(error).__name__}: {error}"
        raise UnknownNetworkError(
            f"{class_name} does not run on tensors without values: {reason}"
        ) from error


def without_memory(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """A diffusers network of this class and configuration, on the meta device. Raises
    `UnknownNetworkError`."""
    with torch.device("meta"):
        return _class_of(class_name).from_config(dict(config))


def head_parameters(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Of the discriminator's head on its middle for samples of `shape` (C,h,w), as `DmdNetworks`
    makes it. Raises ValueError for a network without a middle."""
    middle = middle_of(network, min(shape[1:]))
    with torch.device("meta"):
        head = DiscriminatorHead(middle.channels, middle.size)
    return sum(parameter.numel() for parameter in head.parameters())


def condition_bytes(network: nn.Module, *, text_tokens: int = 77) -> int:
    """Of one row of what a diffusers network is told beside x_t and t."""
    name, model = type(network).__name__, cast(Any, network)
    with torch.device("meta"):
        condition = _condition(name, model.config, _TEXT_TOKENS.get(name, text_tokens))
    found = (getattr(condition, field.name) for field in fields(condition))
    return sum(tensor.nbytes for tensor in found if tensor is not None)


def _class_of(name: str) -> Any:
    cls = getattr(diffusers, name, None)
    if cls is None or name not in _DRIVEN:
        raise UnknownNetworkError(f"{name} is not a network this version drives")
    return cls


def _played(
    cls: Any,
    config: Mapping[str, Any],
    shape: tuple[int, ...],
    tokens: int,
    *,
    bf16: bool,
    checkpointing: bool,
) -> PassMemory:
    with FakeTensorMode():
        model: Any = cls.from_config(dict(config)).eval()  # as `DmdNetworks` trains it
        if checkpointing:
            model.enable_gradient_checkpointing()
        network = DiffusersNetwork(model)

        def run(samples: int) -> torch.Tensor:
            cond = _condition(cls.__name__, model.config, tokens).expand(samples)
            x, t = torch.empty(samples, *shape), torch.zeros(samples, dtype=torch.long)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                return network(x, t, cond)

        model.requires_grad_(False)
        frozen = _frozen(model, run, 1), _frozen(model, run, _MANY)
        model.requires_grad_(True)
        few, many = _trained(model, run, 1), _trained(model, run, _MANY)
    return PassMemory((few[0], many[0]), (few[1], many[1]), frozen)


def _condition(class_name: str, config: Mapping[str, Any], tokens: int) -> Condition:
    """One row of what the class is told beside x_t and t."""
    if class_name == "UNet2DModel":
        labels = torch.zeros(1, dtype=torch.long) if config.get("num_class_embeds") else None
        return Condition(labels=labels)
    if class_name == "UNet2DConditionModel":
        return _unet_condition(config, tokens)
    if class_name == "PixArtTransformer2DModel":
        width = config["caption_channels"]
        return Condition(text=torch.empty(1, tokens, width), mask=torch.ones(1, tokens))
    guidance = torch.empty(1) if config.get("guidance_embeds") else None
    text = torch.empty(1, tokens, config["joint_attention_dim"])
    pooled = torch.empty(1, config["pooled_projection_dim"])
    return Condition(text=text, pooled=pooled, guidance=guidance)


def _unet_condition(config: Mapping[str, Any], tokens: int) -> Condition:
    width = config["cross_attention_dim"]
    width = width if isinstance(width, int) else width[0]
    text = torch.empty(1, tokens, width)
    if config.get("addition_embed_type") != "text_time":
        return Condition(text=text)
    own = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return Condition(text=text, pooled=torch.empty(1, own), time_ids=torch.empty(1, 6))


# ------------------------------------------------------------------ adding up


def _frozen(model: nn.Module, run: Callable[[int], torch.Tensor], samples: int) -> int:
    live = _Live(model)
    with live, torch.no_grad():
        run(samples)
    return live.peak


def _trained(model: nn.Module, run: Callable[[int], torch.Tensor], samples: int) -> tuple[int, int]:
    """(held after the forward pass, peak of both)."""
    live = _Live(model)
    with live:
        loss = run(samples).sum()
        held = live.now
        loss.backward()
    model.zero_grad(set_to_none=True)
    return held, live.peak


class _Live(TorchDispatchMode):
    """Bytes of all storages made under it that are still referred to. Views of a weight are none:
    the weights of `model` are there already."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        tensors = (*model.parameters(), *model.buffers())
        self._own = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes or key in self._own:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _between(values: tuple[int, int], samples: float) -> float:
    """Linear through (1, values[0]) and (8, values[1])."""
    return values[0] + (values[1] - values[0]) * (samples - 1) / (_MANY - 1)
