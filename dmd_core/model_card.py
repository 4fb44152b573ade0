"""The README.md of an exported student: what it is, whom it comes from and how plain diffusers runs
it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import yaml

from dmd_core.families import Family
from dmd_core.plain_call import student_call

_TERMS = ("license", "license_name", "license_link")  # of a card's front matter
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_CREDIT = re.compile(
    r"^##+ [^\n]*\b(?:credits?|attribution)\b[^\n]*\n(.*?)(?=^#+ |\Z)",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
# What constructing a value that is not what its tag says raises, beside YAML's own error.
_BROKEN = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Origin:
    """What a student's card says of its teacher. `terms`: what the teacher's own card has of
    license, license_name and license_link; `credit`: its section about that, Markdown; `hub_id`,
    `revision`: of a model of a hub; `safety_checker`: did the teacher's pipeline name one?"""

    terms: Mapping[str, str | list[str]] = field(default_factory=dict)
    credit: str = ""
    hub_id: str = ""
    revision: str = ""
    safety_checker: bool = False


UNKNOWN = Origin()


def card_terms(text: str) -> dict[str, str | list[str]]:
    """`Origin.terms` of a card. Nobody has checked it: a front matter that is none says nothing."""
    found = _FRONT.match(text)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except _BROKEN:
        return {}
    if not isinstance(front, dict):
        return {}
    return {name: front[name] for name in _TERMS if _is_text(front.get(name))}


def card_credit(text: str) -> str:
    """`Origin.credit` of a card: the section whose heading speaks of credit."""
    found = _CREDIT.search(text)
    return found[1].strip() if found else ""


def model_card(
    family: Family,
    card: dict,
    size: tuple[int, int],
    steps: int,
    lora: bool,
    absent: Sequence[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
    origin: Origin = UNKNOWN,
) -> str:
    """`card`: provenance, as JSON values. `size`: height and width in pixels that the student was
    trained at. `absent`: components the teacher was used without, of which diffusers wants to be
    told. `dtype`: of the weights."""
    without = "".join(f", {name}=None" for name in absent)
    title = "A one-step student" if steps == 1 else f"A {steps}-step student"
    return f"""---
{_front_matter(family, origin)}---

# {title}

Distilled from a multi-step teacher with Distribution Matching Distillation
(Yin et al., CVPR 2024). It makes a picture in {steps} network evaluation{"s" * (steps > 1)}:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder"{without})
{_call(family, size, steps)}
```

{_guidance(family)} The weights are {str(dtype).removeprefix("torch.")}.
{_adapters(family) if lora else ""}{_teacher(origin)}
## Provenance

```json
{json.dumps(card, indent=2)}
```
"""


def _front_matter(family: Family, origin: Origin) -> str:
    task = "unconditional-image-generation" if family.on_pixels else "text-to-image"
    front = {
        "library_name": "diffusers",
        "pipeline_tag": task,
        "tags": ["distribution-matching-distillation", "few-step"],
        **origin.terms,
    }
    if origin.hub_id:
        front["base_model"] = origin.hub_id
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _teacher(origin: Origin) -> str:
    """A section about it; empty where nothing is known."""
    told = []
    if origin.hub_id:
        told.append(f"`{origin.hub_id}` at commit `{origin.revision}`.")
    if origin.terms:
        terms = ", ".join(f"{name} {_one_line(value)}" for name, value in origin.terms.items())
        told.append(f"The teacher's card says: {terms}.")
    if origin.safety_checker:
        told.append(
            "The teacher's safety checker was not taken along: nothing looks at these pictures."
        )
    if origin.credit:
        quoted = "\n".join(f"> {line}".rstrip() for line in origin.credit.splitlines())
        told.append(f"Credit, as that card gives it:\n\n{quoted}")
    if not told:
        return ""
    return "\n## Teacher\n\n" + "\n\n".join(told) + "\n"


def _one_line(value: str | list[str]) -> str:
    return " ".join((value if isinstance(value, str) else ", ".join(value)).split())


def _is_text(value: object) -> bool:
    several = value if isinstance(value, list) else [value]
    return bool(several) and all(isinstance(one, str) and one for one in several)


def _call(family: Family, size: tuple[int, int], steps: int) -> str:
    if family.takes("class_labels"):
        return f'{student_call(family, 3, size, steps)}.save("3.png")  # the number of a class'
    name, what = ("picture", None) if family.on_pixels else ("fox", "fox")
    return f'{student_call(family, what, size, steps)}.save("{name}.png")'


def _adapters(family: Family) -> str:
    folder = "path/to/this/folder/lora"
    call = f'pipe.load_lora_weights("{folder}")'
    if not family.loads_adapters:
        call = f'peft.PeftModel.from_pretrained(pipe.{family.model}, "{folder}")'
    return f"""
The folder `lora/` holds the adapters alone. On the teacher, with this folder's scheduler:

```python
{call}
```
"""


def _guidance(family: Family) -> str:
    if family.on_pixels:
        return "Guidance is part of the student."
    if family.pipeline == "FluxPipeline":
        return (
            "Guidance is part of the student; leave `guidance_scale` at the pipeline's default, "
            f"{family.own_guidance}."
        )
    return "Guidance is part of the student; leave `guidance_scale` at 0."
