"""The inverse of diffusers' conversion: a tiny Stable Diffusion as one file in the original format.

Names of the CompVis implementation, which is what fine-tunes are shared in.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}


def save_original(pipeline: Any, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write UNet, VAE and text encoder of a Stable Diffusion 1.x pipeline to one file."""
    layers = pipeline.unet.config.layers_per_block
    levels = len(pipeline.vae.config.block_out_channels)
    renamed = {
        f"model.diffusion_model.{_unet_name(name, layers)}": value
        for name, value in pipeline.unet.state_dict().items()
    }
    renamed |= {
        f"first_stage_model.{_vae_name(name, levels)}": value
        for name, value in pipeline.vae.state_dict().items()
    }
    renamed |= {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": value
        for name, value in pipeline.text_encoder.state_dict().items()
    }
    save_file({name: value.to(dtype).contiguous() for name, value in renamed.items()}, path)


def _unet_name(name: str, layers: int) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    side, rest = name.split(".", 1)
    if side == "mid_block":
        kind, number, rest = rest.split(".", 2)
        place = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{_inside(rest)}"
    block, kind, number, rest = rest.split(".", 3)
    first = int(block) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{leaf}"
    if kind == "upsamplers":  # after the attention, in a block that has one
        return f"output_blocks.{first + layers}.2.{rest}"
    place = 1 if kind == "attentions" else 0
    blocks, at = ("output_blocks", 0) if side == "up_blocks" else ("input_blocks", 1)
    return f"{blocks}.{first + int(number) + at}.{place}.{_inside(rest)}"


def _inside(rest: str) -> str:
    module, _, end = rest.partition(".")
    return f"{_RESNET.get(module, module)}.{end}"


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    last = levels - 1
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{last - int(m[1])}.block", name)
    return re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name
    )
