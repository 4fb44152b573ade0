"""Stable Diffusion 1.5 and XL as large as they are published, with random weights.

The configurations are those that lie beside the published weights (`unet/config.json` and so on);
what is not named is diffusers' or transformers' default, which is the model's own. The tokenizer is
not theirs: it knows letters, and its ids fall into the text encoders' tables.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from dmd_core.miniature import BOS, EOS, MiniatureSize, Vocabulary, make_tokenizer

_CROSS = "CrossAttnDownBlock2D"
_LETTERS = [chr(code) for code in range(97, 123)]
_MAX_TOKENS = 77


@dataclass(frozen=True)
class Architecture:
    """`parameters`: of the UNet, as the published file has them; `encoders`: one, or SDXL's two."""

    unet: dict[str, Any]
    parameters: int
    vae: dict[str, Any]
    encoders: tuple[dict[str, Any], ...]


_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}
_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
ARCHITECTURES = {
    "sd15": Architecture(
        unet={
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "down_block_types": (*(_CROSS,) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        },
        parameters=859_520_964,
        vae=_VAE | {"sample_size": 512},
        encoders=(_CLIP_L,),
    ),
    "sdxl": Architecture(
        unet={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "down_block_types": ("DownBlock2D", _CROSS, _CROSS),
            "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        },
        parameters=2_567_463_684,
        vae=_VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        encoders=(_CLIP_L, _CLIP_G),
    ),
}
_NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def main() -> None:
    """`python -m benchmarks.published sdxl /models/random-sdxl`"""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=list(ARCHITECTURES))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write_published(options.name, options.folder)


def write_published(name: str, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """A teacher of random weights; in float16, as the fp16 variants of both are, 2 GB and 7 GB."""
    torch.manual_seed(0)
    pipeline = _pipeline(ARCHITECTURES[name], dtype)
    found = sum(p.numel() for p in pipeline.unet.parameters())
    assert found == ARCHITECTURES[name].parameters, f"{name}: {found} parameters in the UNet"
    pipeline.save_pretrained(folder)


def letters_tokenizer(size: MiniatureSize) -> CLIPTokenizer:
    tokens = [BOS, EOS, *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    vocabulary = Vocabulary({token: index for index, token in enumerate(tokens)}, ())
    return make_tokenizer(vocabulary, size)


def _pipeline(architecture: Architecture, dtype: torch.dtype) -> DiffusionPipeline:
    vae = _random(lambda: AutoencoderKL(**architecture.vae), dtype)
    unet = _random(lambda: UNet2DConditionModel(**architecture.unet), dtype)
    tokenizer = letters_tokenizer(MiniatureSize(max_tokens=_MAX_TOKENS))
    texts = [CLIPTextConfig(**config, **_text(tokenizer)) for config in architecture.encoders]
    absent: dict[str, Any] = {"feature_extractor": None}
    first = _random(lambda: CLIPTextModel(texts[0]), dtype)
    if len(texts) == 1:
        pndm: Any = PNDMScheduler(**_NOISE, skip_prk_steps=True)
        absent |= {"safety_checker": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(vae, first, tokenizer, unet, pndm, **absent)
    second = _random(lambda: CLIPTextModelWithProjection(texts[1]), dtype)
    euler: Any = EulerDiscreteScheduler(**_NOISE, timestep_spacing="leading")
    return StableDiffusionXLPipeline(
        vae, first, second, tokenizer, tokenizer, unet, euler, add_watermarker=False
    )


def _text(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "max_position_embeddings": _MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _random(make: Callable[[], nn.Module], dtype: torch.dtype) -> Any:
    """Without the initialisation of each layer, which takes minutes: what goes in comes out about
    as large, so that the numbers stay finite through every layer."""
    with torch.device("meta"):
        network: Any = make()
    nn.Module.to_empty(network.to(dtype), device="cpu")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape) * fan_in**-0.5)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
        for name, buffer in network.named_buffers():
            if "position_ids" in name:
                buffer.copy_(torch.arange(buffer.shape[-1])[None])
    return network


if __name__ == "__main__":
    main()
