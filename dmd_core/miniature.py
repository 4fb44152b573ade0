"""The miniature Stable Diffusion: the same classes as SD 1.5, small enough for two CPU cores.

32×32 pixels, 8×8×4 latents. It predicts v (as Stable Diffusion 2.x does), because at t = 999 a
v-prediction network says x₀ almost directly, where an ε-prediction network's error is divided by
α = 0.068: a one-step student of this size needs that.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MiniaturePrediction = Literal["epsilon", "v_prediction", "sample"]
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class MiniatureSize:
    """Sizes of the three networks. `latent_size` = `image_size` / 4."""

    image_size: int = 32
    vae_channels: tuple[int, ...] = (32, 64, 96)
    unet_channels: tuple[int, int] = (96, 192)
    layers_per_block: int = 1
    heads: int = 4
    text_dim: int = 192
    text_layers: int = 2
    max_tokens: int = 24
    vocabulary: int = 3000
    norm_groups: int = 8

    @property
    def latent_size(self) -> int:
        return self.image_size // 2 ** (len(self.vae_channels) - 1)


@dataclass(frozen=True)
class Vocabulary:
    """What a byte-pair tokenizer knows: token → id, and merges in order."""

    tokens: dict[str, int]
    merges: tuple[tuple[str, str], ...]


def learn_vocabulary(captions: Iterable[str], size: MiniatureSize) -> Vocabulary:
    """Byte-pair merges learned from `captions`, for CLIP's own tokenizer.

    Not the same from process to process: the trainer breaks ties by hash order. Keep the result;
    a model reads its embeddings by these ids.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    template = CLIPTokenizer(vocab={BOS: 0, EOS: 1}, merges=[]).backend_tokenizer
    bpe = Tokenizer(models.BPE(unk_token=EOS, end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = template.normalizer, template.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    # Every printable character also alone, so that any spelling has tokens for its last letter.
    alphabet = [chr(code) for code in range(33, 127)]
    bpe.train_from_iterator([*captions, *alphabet], trainer)
    model = json.loads(bpe.to_str())["model"]
    return Vocabulary(model["vocab"], tuple((left, right) for left, right in model["merges"]))


def make_tokenizer(vocabulary: Vocabulary, size: MiniatureSize) -> CLIPTokenizer:
    merges: Any = list(vocabulary.merges)
    return CLIPTokenizer(vocab=vocabulary.tokens, merges=merges, model_max_length=size.max_tokens)


def build_vae(size: MiniatureSize) -> AutoencoderKL:
    levels = len(size.vae_channels)
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": size.vae_channels,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": size.norm_groups,
        "sample_size": size.image_size,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**settings)


def build_unet(size: MiniatureSize) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=size.latent_size,
        in_channels=4,
        out_channels=4,
        block_out_channels=size.unet_channels,
        layers_per_block=size.layers_per_block,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=size.text_dim,
        attention_head_dim=size.heads,  # diffusers' name for the number of heads here
        norm_num_groups=size.norm_groups,
    )


def build_text_encoder(size: MiniatureSize, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.text_dim,
        "intermediate_size": 4 * size.text_dim,
        "num_hidden_layers": size.text_layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.max_tokens,
        "projection_dim": size.text_dim,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextModel(CLIPTextConfig(**settings))


def build_scheduler(
    prediction_type: MiniaturePrediction = "v_prediction",
) -> DPMSolverMultistepScheduler:
    """Stable Diffusion's noise schedule (scaled-linear β from 0.00085 to 0.012)."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def build_miniature(
    size: MiniatureSize,
    vocabulary: Vocabulary,
    prediction_type: MiniaturePrediction = "v_prediction",
) -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` with random weights."""
    tokenizer = make_tokenizer(vocabulary, size)
    return assemble(
        {
            "vae": build_vae(size),
            "text_encoder": build_text_encoder(size, tokenizer),
            "tokenizer": tokenizer,
            "unet": build_unet(size),
            "scheduler": build_scheduler(prediction_type),
        }
    )


def assemble(parts: dict[str, Any]) -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` of its five `parts`, without the safety checker."""
    absent: dict[str, Any] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return StableDiffusionPipeline(**(parts | absent))
