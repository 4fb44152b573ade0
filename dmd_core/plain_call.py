"""A pipeline called as its user calls it: plain diffusers, with given noise. For measuring and
timing, and as what our own sampling is compared with."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConsistencyModelPipeline, FluxPipeline

from dmd_core.families import FAMILIES, Family


def family_of_pipeline(pipeline: Any) -> Family:
    return FAMILIES[type(pipeline).__name__]


def student_guidance(family: Family) -> float:
    """What a student is called with: guidance is part of it. A guidance-distilled network is told
    the pipeline's own scale, at which its student was trained."""
    return family.own_guidance if family.pipeline == "FluxPipeline" else 0.0


def with_latents(pipeline: Any) -> Any:
    """The same networks in a pipeline that takes `latents`: DDPM's and DDIM's draw their own."""
    family = family_of_pipeline(pipeline)
    if family.takes("latents"):
        return pipeline
    return ConsistencyModelPipeline(pipeline.unet, pipeline.scheduler)


def call_arguments(
    family: Family,
    prompts: Sequence[str],
    labels: torch.Tensor | None,
    eps: torch.Tensor,
    size: tuple[int, int],
) -> dict[str, Any]:
    """What `__call__` takes for these rows: `labels` (B,) of a class-conditional model, ε
    (B,C,h,w), height and width in pixels."""
    latents: dict[str, Any] = {"latents": eps}
    if family.on_pixels:
        classes = None if labels is None else labels.tolist()
        return latents | {"batch_size": len(eps), "class_labels": classes}
    if family.pipeline == "FluxPipeline":
        latents = {"latents": FluxPipeline._pack_latents(eps, *eps.shape)}
    if family.takes("use_resolution_binning"):
        latents["use_resolution_binning"] = False  # it would round height and width
    return latents | {"prompt": list(prompts), "height": size[0], "width": size[1]}


def samples_of(family: Family, pipeline: Any, shape: torch.Size, **arguments: Any) -> torch.Tensor:
    """Call the pipeline; its samples (B,C,h,w), pixels in [−1, 1] where it has no VAE."""
    if family.on_pixels:
        return pipeline(**arguments, output_type="pt").images * 2 - 1
    latents = pipeline(**arguments, output_type="latent").images
    if family.pipeline == "FluxPipeline":
        latents = FluxPipeline._unpack_latents(latents, shape[-2], shape[-1], 1)
    return latents
