"""The README.md of an exported student: what it is and how plain diffusers runs it."""

import json
from collections.abc import Sequence

from dmd_core.families import Family
from dmd_core.plain_call import student_call


def model_card(
    family: Family,
    card: dict,
    size: tuple[int, int],
    steps: int,
    lora: bool,
    absent: Sequence[str] = (),
) -> str:
    """`card`: provenance, as JSON values. `size`: height and width in pixels that the student was
    trained at. `absent`: components the teacher was used without, of which diffusers wants to be
    told."""
    without = "".join(f", {name}=None" for name in absent)
    title = "A one-step student" if steps == 1 else f"A {steps}-step student"
    adapters = (
        "\nThe folder `lora/` holds the adapters alone, for `load_lora_weights` on the teacher "
        "with this folder's scheduler.\n"
        if lora
        else ""
    )
    task = "unconditional-image-generation" if family.on_pixels else "text-to-image"
    return f"""---
library_name: diffusers
pipeline_tag: {task}
tags: [distribution-matching-distillation, few-step]
---

# {title}

Distilled from a multi-step teacher with Distribution Matching Distillation
(Yin et al., CVPR 2024). It makes a picture in {steps} network evaluation{"s" * (steps > 1)}:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder"{without})
{_call(family, size, steps)}
```

{_guidance(family)}
{adapters}
## Provenance

```json
{json.dumps(card, indent=2)}
```
"""


def _call(family: Family, size: tuple[int, int], steps: int) -> str:
    if family.takes("class_labels"):
        return f'{student_call(family, 3, size, steps)}.save("3.png")  # the number of a class'
    name, what = ("picture", None) if family.on_pixels else ("fox", "fox")
    return f'{student_call(family, what, size, steps)}.save("{name}.png")'


def _guidance(family: Family) -> str:
    if family.on_pixels:
        return "Guidance is part of the student."
    if family.pipeline == "FluxPipeline":
        return (
            "Guidance is part of the student; leave `guidance_scale` at the pipeline's default, "
            f"{family.own_guidance}."
        )
    return "Guidance is part of the student; leave `guidance_scale` at 0."
