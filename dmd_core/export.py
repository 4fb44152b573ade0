"""Station 8: the trained student as a plain diffusers pipeline that samples in one step."""

import json
import shutil
import uuid
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from dmd_core.checkpoint import Tensors
from dmd_core.teacher import Teacher


def one_step_scheduler(teacher_config: dict) -> DDIMScheduler:
    """A scheduler whose single step is at T−1 and returns x̂₀ itself.

    "trailing" spacing puts one step at T−1; DDIM's last step, with ᾱ = 1 after it, returns the
    predicted x₀ without any re-noising.
    """
    scheduler = DDIMScheduler.from_config(
        dict(teacher_config),
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        thresholding=False,
    )
    assert isinstance(scheduler, DDIMScheduler)
    return scheduler


def export_student(
    teacher: Teacher, generator: Tensors, target: str, *, card: dict, dtype: torch.dtype
) -> None:
    """Write `target`/ as a pipeline folder: the teacher's parts, the student's UNet, one step.

    `card` goes into the model card. A folder is complete or absent: it is written beside and
    moved into place.
    """
    pipeline = teacher.pipeline
    own = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    scheduler = pipeline.scheduler
    temporary = Path(f"{target}.{uuid.uuid4().hex}.tmp")
    try:
        pipeline.unet.load_state_dict(generator)
        pipeline.register_modules(scheduler=one_step_scheduler(scheduler.config))
        _save(pipeline, temporary, dtype)
        (temporary / "README.md").write_text(_model_card(card))
        if Path(target).exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        pipeline.register_modules(scheduler=scheduler)
        pipeline.unet.load_state_dict(own)
        shutil.rmtree(temporary, ignore_errors=True)


def _save(pipeline: DiffusionPipeline, folder: Path, dtype: torch.dtype) -> None:
    """Save in `dtype` and leave the loaded pipeline in float32."""
    for part in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        part.to(dtype)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for part in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        part.float()


def _model_card(card: dict) -> str:
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [distribution-matching-distillation, one-step]
---

# A one-step student

Distilled from a multi-step teacher with Distribution Matching Distillation
(Yin et al., CVPR 2024). It makes a picture in one network evaluation:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
pipe("fox", num_inference_steps=1, guidance_scale=0).images[0].save("fox.png")
```

Guidance is part of the student; leave `guidance_scale` at 0.

## Provenance

```json
{json.dumps(card, indent=2)}
```
"""
