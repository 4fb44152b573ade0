"""A tiny pipeline of random weights for every teacher family: the real classes, nothing else small.

Latents have 8×8 pixels of a 16×16 picture, pixel models 8×8.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ConsistencyModelPipeline,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CLASSES = ["cat", "dog", "ship"]
WIDTH = 16  # of every text encoder
SIDE = 16  # pixels of a picture with latents
_KEPT = json.loads((Path(__file__).parents[1] / "tiny_vocabulary.json").read_text())


def clip_tokenizer() -> CLIPTokenizer:
    merges: Any = [tuple(pair) for pair in _KEPT["merges"]]
    return CLIPTokenizer(vocab=_KEPT["tokens"], merges=merges, model_max_length=12)


def clip(with_projection: bool = False, vocabulary: int = 0) -> Any:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=vocabulary or len(tokenizer), hidden_size=WIDTH, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12,
        projection_dim=WIDTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)


def t5_tokenizer() -> T5TokenizerFast:
    """Single characters, as a unigram model has them."""
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -3.0) for c in letters)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=128, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config)


def vae(channels: int = 4, **settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=channels,
        norm_num_groups=4, sample_size=SIDE, mid_block_add_attention=False, **settings,
    )  # fmt: skip


def _conditional_unet(**settings: Any) -> UNet2DConditionModel:
    own: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(own | settings))


def pixel_unet(classes: int | None) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, attention_head_dim=8,
        num_class_embeds=classes, freq_shift=1,
    )  # fmt: skip


# ------------------------------------------------------------------ the pipelines


def stable_diffusion(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=prediction_type, timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip
    absent: dict[str, Any] = dict(
        safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    return StableDiffusionPipeline(
        vae(), clip(), clip_tokenizer(), _conditional_unet(), scheduler, **absent
    )


def sdxl() -> StableDiffusionXLPipeline:
    unet = _conditional_unet(
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip
    tokenizers = clip_tokenizer(), clip_tokenizer()
    return StableDiffusionXLPipeline(vae(), clip(), clip(True), *tokenizers, unet, scheduler)


def sd3(with_t5: bool = True, **scheduler: Any) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=16,
    )  # fmt: skip
    third: Any = _wide_t5() if with_t5 else None
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
        vae(shift_factor=0.06), clip(True), clip_tokenizer(), clip(True), clip_tokenizer(),
        third, t5_tokenizer() if with_t5 else None,  # type: ignore[arg-type]
    )  # fmt: skip


def _wide_t5() -> T5EncoderModel:
    """As wide as both CLIP encoders together, and more, as SD 3 has it."""
    config = t5().config
    config.d_model = 2 * WIDTH
    return T5EncoderModel(config)


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds,
        base_image_seq_len=4, max_image_seq_len=64,
    )  # fmt: skip
    return FluxPipeline(
        scheduler, vae(shift_factor=0.1), clip(), clip_tokenizer(), t5(), t5_tokenizer(),
        transformer,
    )  # fmt: skip


def pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=3,
        attention_head_dim=8, num_attention_heads=4, cross_attention_dim=32,
        caption_channels=WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.02)
    return PixArtSigmaPipeline(t5_tokenizer(), t5(), vae(), transformer, scheduler)


def edm_pixels() -> ConsistencyModelPipeline:
    """Class-conditional, with a "no class" label behind the named ones."""
    scheduler: Any = EDMEulerScheduler()
    return ConsistencyModelPipeline(pixel_unet(len(CLASSES) + 1), scheduler)


def ddpm_pixels() -> ConsistencyModelPipeline:
    scheduler: Any = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    )
    return ConsistencyModelPipeline(pixel_unet(len(CLASSES)), scheduler)


def unconditional() -> DDPMPipeline:
    return DDPMPipeline(pixel_unet(None), DDPMScheduler())


BUILDERS: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sd v": lambda: stable_diffusion("v_prediction"),
    "sdxl": sdxl,
    "sd3": sd3,
    "sd3 without t5": lambda: sd3(with_t5=False),
    "sd3 dynamic": lambda: sd3(use_dynamic_shifting=True),
    "flux": flux,
    "flux schnell": lambda: flux(guidance_embeds=False),
    "pixart": pixart,
    "edm": edm_pixels,
    "ddpm": ddpm_pixels,
    "unconditional": unconditional,
}


@torch.no_grad()
def stir(part: torch.nn.Module) -> None:
    """Some layers start at zero (a transformer's last), and nothing would depend on what is before
    them."""
    for parameter in part.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)


def save_family(name: str, folder: Path, change: Callable[[torch.nn.Module], object] = stir) -> str:
    """A folder with the family's pipeline; weights depend on the name, and on what `change` does to
    each network, alone."""
    torch.manual_seed(sum(map(ord, name)))
    pipeline = BUILDERS[name]()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            change(part)
    pipeline.save_pretrained(folder)
    if name in ("edm", "ddpm"):
        (folder / "classes.json").write_text(json.dumps(CLASSES))
    return str(folder)
