"""diffusers' denoising networks, driven and read alike: UNets and transformers.

One table says for every class how it is called and where its middle lies. Outside of this module
samples are (B,C,h,w), conditions are `Condition`, and nothing knows the classes' arguments.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from dmd_core.condition import Condition

# (network, network input (B,C,h,w), network time (B,), cond) → raw output (B,C,h,w)
Call = Callable[[Any, torch.Tensor, torch.Tensor, Condition], torch.Tensor]


class DiffusersNetwork(nn.Module):
    """A diffusers model as a raw network: `Condition` → the arguments its class takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        return _call_of(self.model)(self.model, x, time, cond)


def _call_of(model: nn.Module) -> Call:
    for cls, call in _CALLS.items():
        if isinstance(model, cls):
            return call
    raise TypeError(
        f"{type(model).__name__} is not a network this version drives; "
        f"expected {', '.join(cls.__name__ for cls in _CALLS)}"
    )


# ------------------------------------------------------------------ how each class is called


def _call_unet(unet: Any, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
    arguments: dict[str, Any] = {}
    if cond.labels is not None:
        arguments["class_labels"] = cond.labels
    if isinstance(unet, UNet2DConditionModel):
        arguments["encoder_hidden_states"] = cond.text
        if cond.pooled is not None:  # SDXL
            arguments["added_cond_kwargs"] = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    return unet(x, time, **arguments, return_dict=False)[0]


def _call_sd3(model: Any, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
    return model(
        hidden_states=x,
        timestep=time,
        encoder_hidden_states=cond.text,
        pooled_projections=cond.pooled,
        return_dict=False,
    )[0]


def _call_flux(model: Any, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
    """Packs 2×2 latents into one token, as `FluxPipeline` does, and unpacks what comes out."""
    (rows, channels, height, width), text = x.shape, cond.text
    assert text is not None
    output = model(
        hidden_states=FluxPipeline._pack_latents(x, rows, channels, height, width),
        timestep=time / 1000,
        guidance=cond.guidance,
        pooled_projections=cond.pooled,
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=text.dtype),
        img_ids=FluxPipeline._prepare_latent_image_ids(
            rows, height // 2, width // 2, x.device, text.dtype
        ),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(output, height, width, 1)


def _call_pixart(model: Any, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
    """Where it also learned a variance, that is the second half of the channels."""
    output = model(
        x,
        encoder_hidden_states=cond.text,
        encoder_attention_mask=cond.mask,
        timestep=time,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return output[:, : x.shape[1]]


_CALLS: dict[type[nn.Module], Call] = {
    UNet2DConditionModel: _call_unet,
    UNet2DModel: _call_unet,
    SD3Transformer2DModel: _call_sd3,
    FluxTransformer2DModel: _call_flux,
    PixArtTransformer2DModel: _call_pixart,
}


# ------------------------------------------------------------------ where the middle lies


@dataclass(frozen=True)
class Middle:
    """The block whose output a discriminator reads: `channels` features on a grid whose shorter
    side is `size`, as (B,C,h,w), or as tokens (B,N,C) of `patch` × `patch` latents.

    `after`: the modules behind it that may be given fewer rows than the block had.
    """

    block: nn.Module
    channels: int
    size: int
    patch: int
    after: tuple[nn.Module, ...] = ()


def middle_of(network: nn.Module, side: int) -> Middle:
    """The middle of a diffusers model for samples whose shorter side is `side`."""
    model: Any = network
    if isinstance(network, (UNet2DConditionModel, UNet2DModel)):
        if model.mid_block is None:
            raise ValueError("this UNet has no middle block (mid_block_type) for the discriminator")
        channels = model.config.block_out_channels
        # Every level but the last halves it.
        size = math.ceil(side / 2 ** (len(channels) - 1))
        return Middle(model.mid_block, channels[-1], size, 1, tuple(model.up_blocks))
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]
    at = (len(blocks) - 1) // 2
    # The others are also given tensors without rows (FLUX's positions), or use the time again
    # outside of any module (PixArt): all their rows run to the end.
    after = (*blocks[at + 1 :], model.norm_out) if isinstance(model, SD3Transformer2DModel) else ()
    patch = token_patch(type(model).__name__, model.config)
    return Middle(blocks[at], model.inner_dim, side // patch, patch, after)


def token_patch(class_name: str, config: Any) -> int:
    """Latents per side of one token; 1 for UNets."""
    if class_name == FluxTransformer2DModel.__name__:
        return 2  # packed by the pipeline, not by the model
    return int(config.get("patch_size") or 1)


def feature_map(features: torch.Tensor, x: torch.Tensor, patch: int) -> torch.Tensor:
    """Features of samples x (B,C,h,w) as (B,C',h',w'): tokens (B,N,C') are laid out row by row."""
    if features.ndim == 4:
        return features
    height, width = (side // patch for side in x.shape[2:])
    return features.transpose(1, 2).reshape(len(features), -1, height, width)
