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
    if family.takes("clean_caption"):
        latents["clean_caption"] = False  # where bs4 and ftfy are installed, it edits the prompt
    return latents | {"prompt": list(prompts), "height": size[0], "width": size[1]}


def call_in_words(
    family: Family,
    prompt: str,
    label: int | None,
    size: tuple[int, int],
    steps: int,
    seed: int | None = None,
) -> str:
    """Python that makes a student's picture again from its noise `latents` (1,C,h,w), in plain
    diffusers, called as `call_arguments` says. `pipe` is the student's pipeline; `label` is a
    class-conditional one's; `size`: height and width in pixels; `seed`: of the generator that a
    student of several steps draws new noise from."""
    before = ""
    if not family.takes("latents"):
        before = (
            "from diffusers import ConsistencyModelPipeline\n"
            "pipe = ConsistencyModelPipeline(pipe.unet, pipe.scheduler)  # takes latents\n"
        )
    if family.pipeline == "FluxPipeline":
        before = "latents = pipe._pack_latents(latents, *latents.shape)\n"
    what = label if family.on_pixels else prompt
    given = ["latents=latents"]
    if seed is not None:
        before = f"import torch\n{before}"
        given.append(f"generator=torch.Generator().manual_seed({seed})")
    return before + student_call(family, what, size, steps, *given)


def student_call(
    family: Family, what: str | int | None, size: tuple[int, int], steps: int, *given: str
) -> str:
    """Python for one picture of a student, `pipe`, with all its call needs: `what` is a prompt, a
    label, or None of a model without either; `given`: more arguments."""
    arguments = [*given, f"num_inference_steps={steps}"]
    if family.on_pixels:
        arguments[:0] = [] if what is None else [f"class_labels=[{what}]"]
    else:
        # A pipeline's default is the size its teacher was made for, not the one it was used at.
        arguments[:0] = [repr(what)]
        arguments.append(f"height={size[0]}, width={size[1]}")
    if family.takes("use_resolution_binning"):
        arguments.append("use_resolution_binning=False")
    if family.takes("clean_caption"):
        arguments.append("clean_caption=False")
    if family.takes("guidance_scale"):
        arguments.append(f"guidance_scale={student_guidance(family):g}")
    return f"pipe({', '.join(arguments)}).images[0]"


def samples_of(family: Family, pipeline: Any, shape: torch.Size, **arguments: Any) -> torch.Tensor:
    """Call the pipeline; its samples (B,C,h,w), pixels in [−1, 1] where it has no VAE."""
    if family.on_pixels:
        return pipeline(**arguments, output_type="pt").images * 2 - 1
    latents = pipeline(**arguments, output_type="latent").images
    if family.pipeline == "FluxPipeline":
        latents = FluxPipeline._unpack_latents(latents, shape[-2], shape[-1], 1)
    return latents
