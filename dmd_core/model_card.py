"""The README.md of an exported student: what it is and how plain diffusers runs it."""

import json
from collections.abc import Sequence

from dmd_core.families import Family

_PLAIN = """pipe("fox", {arguments}).images[0].save("fox.png")"""
_CLASSES = """pipe(class_labels=3, {arguments}).images[0].save("3.png")  # the number of a class"""
_NOTHING = """pipe({arguments}).images[0].save("picture.png")"""


def model_card(
    family: Family, card: dict, steps: int, lora: bool, absent: Sequence[str] = ()
) -> str:
    """`card`: provenance, as JSON values. `absent`: components the teacher was used without, of
    which diffusers wants to be told."""
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
{_call(family, steps)}
```

{_guidance(family)}
{adapters}
## Provenance

```json
{json.dumps(card, indent=2)}
```
"""


def _call(family: Family, steps: int) -> str:
    arguments = f"num_inference_steps={steps}"
    if family.takes("class_labels"):
        return _CLASSES.format(arguments=arguments)
    if family.on_pixels:
        return _NOTHING.format(arguments=arguments)
    # Where guidance is an input of the network, its default is what the student was trained with.
    own = "" if family.pipeline == "FluxPipeline" else ", guidance_scale=0"
    return _PLAIN.format(arguments=arguments + own)


def _guidance(family: Family) -> str:
    if family.on_pixels:
        return "Guidance is part of the student."
    if family.pipeline == "FluxPipeline":
        return (
            "Guidance is part of the student; leave `guidance_scale` at the pipeline's default, "
            f"{family.own_guidance}."
        )
    return "Guidance is part of the student; leave `guidance_scale` at 0."
