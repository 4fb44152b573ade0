"""Prompts → `Condition`, through each family's own `encode_prompt`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dmd_core.condition import Condition
from dmd_core.families import Family
from dmd_core.precision import autocast

# Height and width of the picture in pixels: SDXL is told them.
Size = tuple[int, int]
_LONGEST = 512  # tokens that any of the families reads


@dataclass(frozen=True)
class PromptEncoder:
    """A pipeline's tokenizers and text encoders. `class_names`: of a class-conditional model.

    `compute_dtype` bfloat16 runs the text encoders under autocast, as the denoising network is:
    they are often larger than it. Conditions are float32 always.
    """

    family: Family
    pipeline: Any
    device: torch.device
    class_names: tuple[str, ...] = ()
    compute_dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str], size: Size) -> Condition:
        """B rows for B prompts; each distinct prompt is encoded once, all of them in one call.

        Raises `IndexError` for a prompt with a token that a text encoder does not know, or that
        names no class.
        """
        distinct = sorted(set(prompts))
        _check_tokens(self.pipeline, distinct)
        with autocast(self.device, self.compute_dtype):
            condition = _ENCODERS[self.family.pipeline](self, distinct, size)
        condition = _in_float32(condition)
        row = {prompt: index for index, prompt in enumerate(distinct)}
        return condition.rows(torch.tensor([row[prompt] for prompt in prompts], device=self.device))

    def negatives(self, prompts: Sequence[str], size: Size) -> Condition:
        """What guidance moves away from. The empty prompt is the family's own default: of SDXL
        zeros, where its configuration says so."""
        condition = self.prompts(prompts, size)
        if not self.pipeline.config.get("force_zeros_for_empty_prompt", False):
            return condition
        keep = torch.tensor([prompt != "" for prompt in prompts], device=self.device)
        text, pooled = condition.text, condition.pooled
        assert text is not None and pooled is not None
        return replace(condition, text=text * keep[:, None, None], pooled=pooled * keep[:, None])


def _in_float32(condition: Condition) -> Condition:
    text, pooled = (x if x is None else x.float() for x in (condition.text, condition.pooled))
    return replace(condition, text=text, pooled=pooled)


def _check_tokens(pipeline: Any, prompts: list[str]) -> None:
    """Before ids reach a device, where a look-up of an unknown one would end the whole process."""
    for suffix in ("", "_2", "_3"):
        tokenizer = getattr(pipeline, f"tokenizer{suffix}", None)
        encoder = getattr(pipeline, f"text_encoder{suffix}", None)
        if tokenizer is None or encoder is None:
            continue
        known = encoder.get_input_embeddings().num_embeddings
        length = min(tokenizer.model_max_length, _LONGEST)
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True)
        for prompt, ids in zip(prompts, tokens.input_ids, strict=True):
            if max(ids) >= known:
                raise IndexError(
                    f"prompt {prompt[:80]!r} has token {max(ids)}, but the text encoder knows "
                    f"{known} tokens (0 is the first): tokenizer{suffix} and text_encoder{suffix} "
                    "do not fit together"
                )


# ------------------------------------------------------------------ the families


def _stable_diffusion(encoder: PromptEncoder, prompts: list[str], size: Size) -> Condition:
    text, _ = encoder.pipeline.encode_prompt(prompts, encoder.device, 1, False)
    return Condition(text=text)


def _sdxl(encoder: PromptEncoder, prompts: list[str], size: Size) -> Condition:
    pipeline = encoder.pipeline
    text, _, pooled, _ = pipeline.encode_prompt(
        prompts, device=encoder.device, do_classifier_free_guidance=False
    )
    # As its `__call__` has it: original and target size alike, nothing cropped.
    time_ids = pipeline._get_add_time_ids(
        size, (0, 0), size, torch.float32,
        text_encoder_projection_dim=pipeline.text_encoder_2.config.projection_dim,
    )  # fmt: skip
    time_ids = time_ids.to(encoder.device).expand(len(prompts), -1)
    return Condition(text=text, pooled=pooled, time_ids=time_ids)


def _sd3(encoder: PromptEncoder, prompts: list[str], size: Size) -> Condition:
    text, _, pooled, _ = encoder.pipeline.encode_prompt(
        prompts, None, None, device=encoder.device, do_classifier_free_guidance=False
    )
    return Condition(text=text, pooled=pooled)


def _flux(encoder: PromptEncoder, prompts: list[str], size: Size) -> Condition:
    """A guidance-distilled network is told the pipeline's default scale, and so is its student."""
    text, pooled, _ = encoder.pipeline.encode_prompt(prompts, device=encoder.device)
    condition = Condition(text=text, pooled=pooled)
    if not encoder.pipeline.transformer.config.guidance_embeds:
        return condition
    own = torch.full((len(prompts),), encoder.family.own_guidance, device=encoder.device)
    return replace(condition, guidance=own)


def _pixart(encoder: PromptEncoder, prompts: list[str], size: Size) -> Condition:
    text, mask, _, _ = encoder.pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, device=encoder.device, clean_caption=False
    )
    return Condition(text=text, mask=mask)


def _class_labels(encoder: PromptEncoder, prompts: list[str], size: Size) -> Condition:
    """Labels in digits or by their names; "" is the label behind the last name: no class."""
    count = encoder.pipeline.unet.config.num_class_embeds
    if count is None:
        return Condition()
    labels = [class_label(prompt, encoder.class_names, count) for prompt in prompts]
    return Condition(labels=torch.tensor(labels, device=encoder.device))


def class_label(prompt: str, class_names: Sequence[str], count: int) -> int:
    """The label that a prompt means to a model of `count` classes. Raises IndexError: it is none
    of them."""
    names = [name.strip().lower() for name in class_names]
    text, classes = prompt.strip().lower(), len(names) or count
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < classes:
        return int(text)
    if not text and count == classes + 1:
        return classes
    known = f"{', '.join(names[:5])}, … or " if names else ""
    raise IndexError(
        f"prompt {prompt[:80]!r} is not a class of the teacher; expected {known}a label from 0 to "
        f'{classes - 1}. "" (no class, for guidance) needs classes.json and one label more than '
        "it has names"
    )


_Encode = Callable[[PromptEncoder, list[str], Size], Condition]
_ENCODERS: dict[str, _Encode] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "PixArtSigmaPipeline": _pixart,
    "ConsistencyModelPipeline": _class_labels,
    "DDPMPipeline": _class_labels,
    "DDIMPipeline": _class_labels,
}
