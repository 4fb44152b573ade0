"""Station 8: the trained student as a plain diffusers pipeline that samples in its few steps."""

import copy
import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
)
from torch import nn

from dmd_core.checkpoint import Tensors
from dmd_core.lora import LoraSettings, add_lora, fuse_lora, lora_config, lora_state
from dmd_core.ode import noise_settings
from dmd_core.schedule import Schedule
from dmd_core.teacher import Teacher

LORA_FOLDER = "lora"


def student_scheduler(teacher_config: dict, timesteps: tuple[int, ...]) -> SchedulerMixin:
    """A scheduler whose default timesteps, for len(`timesteps`) steps, are exactly `timesteps`.

    Raises ValueError when no scheduler's defaults are these; then the student would need its user
    to pass them by hand. `teacher_config` is the configuration of a variance-preserving scheduler.
    """
    total = teacher_config["num_train_timesteps"]
    if len(timesteps) == 1:
        scheduler = _one_step(teacher_config, timesteps[0])
    else:
        scheduler = _few_steps(teacher_config, timesteps)
    scheduler.set_timesteps(len(timesteps))
    found = tuple(scheduler.timesteps.tolist())
    if found != timesteps:
        even = tuple(total - 1 - total * k // len(timesteps) for k in range(len(timesteps)))
        raise ValueError(
            f"no diffusers scheduler has the timesteps {list(timesteps)} as its default (nearest: "
            f"{list(found)}); expected evenly spaced times such as {list(even)}"
        )
    return scheduler


def _one_step(config: dict, timestep: int) -> DDIMScheduler:
    """One step at `timestep` that returns x̂₀ itself.

    "trailing" spacing puts one step at the last time, and DDIM's last step, with ᾱ = 1 after it,
    returns the predicted x₀ without re-noising. For an earlier time the schedule is cut off there.
    """
    settings: dict = {
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
    }
    if timestep != config["num_train_timesteps"] - 1:
        whole = DDIMScheduler.from_config(dict(config), **noise_settings(config))
        betas = whole.betas[: timestep + 1]
        settings |= {
            "trained_betas": [float(beta) for beta in betas],
            "num_train_timesteps": timestep + 1,
            "rescale_betas_zero_snr": False,  # those betas are rescaled already
        }
    scheduler = DDIMScheduler.from_config(dict(config), **(noise_settings(config) | settings))
    assert isinstance(scheduler, DDIMScheduler)
    return scheduler


def _few_steps(config: dict, timesteps: tuple[int, ...]) -> LCMScheduler:
    """x̂₀, then fresh noise to the next time: what DMD2's student does, and LCM's scheduler too.

    Its default grid of 50 times gives 999, 759, 499, 259; one of all times 999, 749, 499, 249.
    """
    total = config["num_train_timesteps"]
    grids = [n for n in range(total, 0, -1) if total % n == 0 and n >= len(timesteps)]
    for grid in grids:
        scheduler = LCMScheduler.from_config(
            dict(config),
            **noise_settings(config),
            original_inference_steps=grid,
            clip_sample=False,
            thresholding=False,
        )
        assert isinstance(scheduler, LCMScheduler)
        scheduler.set_timesteps(len(timesteps))
        if tuple(scheduler.timesteps.tolist()) == timesteps:
            return scheduler
    return LCMScheduler.from_config(dict(config), original_inference_steps=total)  # type: ignore


def export_student(
    teacher: Teacher,
    generator: Tensors,
    target: str,
    *,
    timesteps: tuple[int, ...],
    card: dict,
    dtype: torch.dtype,
    lora: LoraSettings | None = None,
) -> None:
    """Write `target`/ as a pipeline folder: the teacher's parts, the student's UNet, its steps.

    With `lora`, `generator` holds adapters: the UNet is exported with them fused, and the adapters
    alone go to `target`/lora/. `card` goes into the model card. A folder is complete or absent: it
    is written beside and moved into place. The teacher is left as it was.
    """
    unet = copy.deepcopy(teacher.pipeline.unet)
    scheduler = student_scheduler(dict(teacher.pipeline.scheduler.config), timesteps)
    temporary = Path(f"{target}.{uuid.uuid4().hex}.tmp")
    try:
        if lora is None:
            unet.load_state_dict(generator)
        else:
            _load_adapters(unet, generator, lora)
            _save_adapters(unet, temporary / LORA_FOLDER)
            fuse_lora(unet)
        components = teacher.pipeline.components | {"unet": unet, "scheduler": scheduler}
        pipeline = type(teacher.pipeline)(**components, requires_safety_checker=False)
        _with_dtype(pipeline, dtype, lambda: pipeline.save_pretrained(temporary))
        (temporary / "README.md").write_text(_model_card(card, len(timesteps), lora is not None))
        if Path(target).exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load_adapters(unet: nn.Module, adapters: Tensors, lora: LoraSettings) -> None:
    add_lora(unet, lora, seed=0)
    expected = {name for name, p in unet.named_parameters() if p.requires_grad}
    if adapters.keys() != expected:
        raise ValueError(
            f"the checkpoint holds {len(adapters)} adapter weights, these settings need "
            f"{len(expected)}; was it trained with other lora_rank or lora_targets?"
        )
    unet.load_state_dict(adapters, strict=False)


def _save_adapters(unet: nn.Module, folder: Path) -> None:
    """As diffusers' `load_lora_weights` reads them: pytorch_lora_weights.safetensors."""
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=dict(lora_state(unet)),
        # With the settings: without them a reader takes alpha = rank.
        unet_lora_adapter_metadata=lora_config(unet),
        safe_serialization=True,
    )


def _with_dtype(pipeline: DiffusionPipeline, dtype: torch.dtype, save: Callable[[], None]) -> None:
    """Save in `dtype` and leave the teacher's own parts in float32."""
    parts = (pipeline.vae, pipeline.unet, pipeline.text_encoder)
    try:
        for part in parts:
            part.to(dtype)
        save()
    finally:
        for part in parts:
            part.float()


def check_exportable(schedule: Schedule, config: dict, timesteps: tuple[int, ...] | None) -> None:
    """Fail at the door: are these times of the teacher's schedule, and a scheduler's default?"""
    times = timesteps or (schedule.num_timesteps - 1,)
    wrong = [t for t in times if not 0 <= t < schedule.num_timesteps]
    if wrong:
        raise ValueError(
            f"student_timesteps has {wrong[0]}; the teacher's schedule has the times 0 to "
            f"{schedule.num_timesteps - 1}"
        )
    if schedule.prediction_type == "epsilon" and float(schedule.alphas[max(times)]) < 1e-3:
        raise ValueError(f"at time {max(times)} α is 0, where ε says nothing about x₀")
    scheduler = student_scheduler(config, times)
    exported = Schedule.from_scheduler(scheduler) if hasattr(scheduler, "alphas_cumprod") else None
    index = torch.tensor(times)
    if (
        exported is None
        or exported.prediction_type != schedule.prediction_type
        or not torch.allclose(exported.alphas[index], schedule.alphas[index], rtol=1e-4)
    ):
        raise ValueError(
            f"a {schedule.prediction_type} student of this noise schedule cannot be exported: "
            f"{type(scheduler).__name__} does not carry the schedule; expected a "
            "variance-preserving teacher (Stable Diffusion 1.x or 2.x)"
        )


def _model_card(card: dict, steps: int, lora: bool) -> str:
    title = "A one-step student" if steps == 1 else f"A {steps}-step student"
    adapters = (
        "\nThe folder `lora/` holds the adapters alone, for `load_lora_weights` on the teacher "
        "with this folder's scheduler.\n"
        if lora
        else ""
    )
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [distribution-matching-distillation, few-step]
---

# {title}

Distilled from a multi-step teacher with Distribution Matching Distillation
(Yin et al., CVPR 2024). It makes a picture in {steps} network evaluation{"s" * (steps > 1)}:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
pipe("fox", num_inference_steps={steps}, guidance_scale=0).images[0].save("fox.png")
```

Guidance is part of the student; leave `guidance_scale` at 0.
{adapters}
## Provenance

```json
{json.dumps(card, indent=2)}
```
"""
