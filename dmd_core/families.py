"""The teacher families, a closed table: one line for every pipeline class that can be distilled.

Everything that differs between them is said here or in the two tables it points to (how prompts
become a `Condition`: `prompt_encoding.py`; how a network is called: `diffusers_networks.py`).
"""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers

from dmd_core.latents import Geometry, geometry
from dmd_core.teacher_files import INDEX, WEIGHTS, PartFiles, TeacherError

CLASSES = "classes.json"  # names of a class-conditional model's labels, a JSON list


@dataclass(frozen=True)
class Family:
    """`pipeline`: the class named in model_index.json. `model`: the component that denoises, of one
    of the classes `networks`. `parts`: folders that make the teacher what it is, `optional` ones
    among them. `by_sigmas`: does the pipeline tell its scheduler σ instead of a number of steps?
    `sample_size`: the side of a sample, where the network's configuration does not say it.
    `schedules`: the kinds of noise schedule whose schedulers the pipeline can run.
    """

    pipeline: str
    model: Literal["unet", "transformer"]
    networks: tuple[str, ...]
    parts: tuple[str, ...]
    optional: tuple[str, ...] = ()
    by_sigmas: bool = False
    sample_size: int | None = None
    schedules: tuple[str, ...] = ("vp", "edm")

    @property
    def on_pixels(self) -> bool:
        return "vae" not in self.parts

    @property
    def pipeline_class(self) -> Any:
        return getattr(diffusers, self.pipeline)

    @property
    def loads_adapters(self) -> bool:
        """Does the pipeline have `load_lora_weights`? If not, peft puts adapters on the network."""
        return hasattr(self.pipeline_class, "load_lora_weights")

    @property
    def own_guidance(self) -> float:
        """The guidance scale the pipeline's `__call__` has as its default."""
        return inspect.signature(self.pipeline_class.__call__).parameters["guidance_scale"].default

    def takes(self, argument: str) -> bool:
        """Does the pipeline's `__call__` have this argument?"""
        return argument in inspect.signature(self.pipeline_class.__call__).parameters

    def geometry(self, model: Mapping[str, Any], vae: Mapping[str, Any] | None) -> Geometry:
        """`model`, `vae`: their configurations."""
        size = self.sample_size
        if self.pipeline == "StableDiffusionPipeline" and _of_old_size(model):
            size = 64
        return geometry(model["_class_name"], model, vae, size)


def _of_old_size(unet: Mapping[str, Any]) -> bool:
    """Files of diffusers before 0.9 may have a sample_size that nobody meant; its pipeline reads
    such a one below 64 as 64."""
    size, written_by = unet.get("sample_size"), unet.get("_diffusers_version")
    old = written_by is not None and [*map(int, re.findall(r"\d+", written_by)[:2])] < [0, 9]
    return old and isinstance(size, int) and size < 64


_UNET = ("UNet2DConditionModel",)
_FAMILIES = (
    Family(
        "StableDiffusionPipeline", "unet", _UNET,
        ("vae", "text_encoder", "tokenizer", "unet", "scheduler"),
    ),
    Family(
        "StableDiffusionXLPipeline", "unet", _UNET,
        ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler"),
    ),
    Family(
        "StableDiffusion3Pipeline", "transformer", ("SD3Transformer2DModel",),
        (
            "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2",
            "tokenizer_3", "transformer", "scheduler",
        ),
        optional=("text_encoder_3", "tokenizer_3"), schedules=("flow",),
    ),
    Family(
        "FluxPipeline", "transformer", ("FluxTransformer2DModel",),
        (
            "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer",
            "scheduler",
        ),
        by_sigmas=True, sample_size=128, schedules=("flow",),
    ),
    Family(
        "PixArtSigmaPipeline", "transformer", ("PixArtTransformer2DModel",),
        ("vae", "text_encoder", "tokenizer", "transformer", "scheduler"),
    ),
    *(
        Family(
            name, "unet", ("UNet2DModel",), ("unet", "scheduler", CLASSES),
            optional=(CLASSES,), schedules=schedules,
        )
        for name, schedules in (
            ("ConsistencyModelPipeline", ("vp", "edm")),
            ("DDPMPipeline", ("vp",)),
            ("DDIMPipeline", ("vp",)),
        )
    ),
)  # fmt: skip
FAMILIES = {family.pipeline: family for family in _FAMILIES}


def family_of(path: str | Path) -> Family:
    """The family of a pipeline folder. Raises `TeacherError`: no such folder, or none we know."""
    index = read_index(path)
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise TeacherError(
            f"teacher {path} is a {name}; this version distils {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def read_index(path: str | Path) -> dict[str, Any]:
    """The content of a folder's model_index.json."""
    index = Path(path) / INDEX
    if not index.is_file():
        raise TeacherError(
            f"teacher {path} has no {INDEX}; expected a diffusers pipeline folder "
            "(as written by save_pretrained)"
        )
    try:
        return json.loads(index.read_text())
    except ValueError as error:
        raise TeacherError(f"{index} is not JSON: {error}") from error


def part_config(path: str | Path, part: str) -> dict[str, Any]:
    """The configuration of one part of a pipeline folder."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    try:
        return json.loads((Path(path) / part / name).read_text())
    except (OSError, ValueError) as error:
        raise TeacherError(f"teacher {path} has no readable {part}/{name}: {error}") from error


def folder_geometry(path: str | Path) -> Geometry:
    """The shapes of a teacher's samples, without its weights."""
    family = family_of(path)
    vae = None if family.on_pixels else part_config(path, "vae")
    return family.geometry(part_config(path, family.model), vae)


def guidance_distilled(path: str | Path) -> bool:
    """Is guidance an input of the teacher's network (FLUX.1 dev), instead of a second pass?"""
    return bool(part_config(path, family_of(path).model).get("guidance_embeds", False))


def check_guidance(path: str | Path, asked: Mapping[str, float]) -> None:
    """`asked`: key of the recipe → guidance scale. Raises `TeacherError` for a scale that the
    teacher's own pipeline does not look at: FLUX.1-schnell was made to need none."""
    family = family_of(path)
    if family.pipeline != "FluxPipeline" or guidance_distilled(path):
        return
    for key, scale in asked.items():
        if scale != 1:
            raise TeacherError(
                f"{key} is {scale:g}; expected 1: the network of teacher {path} is told no "
                "guidance (guidance_embeds is false, as FLUX.1-schnell's), and its pipeline has "
                "none beside it"
            )


def check_parts(path: str | Path, family: Family) -> None:
    """Raises `TeacherError` that names what is missing or of another class."""
    folder = Path(path)
    needed = [part for part in family.parts if part not in family.optional]
    for part in needed:
        if not (folder / part).is_dir():
            raise TeacherError(f"teacher {path} has no folder {part}/; expected {_named(family)}")
    for part in present(path, family):
        weightless = part.startswith(("tokenizer", "scheduler")) or part == CLASSES
        if not weightless:
            _check_weights(folder, part)
    found = part_config(path, family.model).get("_class_name")
    if found not in family.networks:
        raise TeacherError(
            f"teacher {path} has a {found} in {family.model}/; expected "
            f"{' or '.join(family.networks)} in a {family.pipeline}"
        )


def _check_weights(folder: Path, part: str) -> None:
    files = PartFiles.in_folder(folder / part)
    try:
        if files.weights():
            return
    except TeacherError as error:
        raise TeacherError(f"teacher {folder}: {part}/{error}") from error
    others = sorted(name for name in files.names if name.endswith(WEIGHTS))
    if not others:
        raise TeacherError(
            f"teacher {folder} has no {part}/*{WEIGHTS} (only safetensors are loaded)"
        )
    raise TeacherError(
        f"teacher {folder} has {part}/{others[0]}, which is not loaded by that name; expected "
        f"diffusion_pytorch_model{WEIGHTS} or model{WEIGHTS}, or shards with their index "
        f"(teacher.variant: fp16 is for *.fp16{WEIGHTS})"
    )


def check_labels(path: str | Path, family: Family) -> None:
    """Raises `TeacherError` for a network on pixels that needs labels, where its pipeline gives it
    none: plain diffusers could not sample its student."""
    if not family.on_pixels:
        return
    config = part_config(path, family.model)
    count, kind = config.get("num_class_embeds"), config.get("class_embed_type")
    if count is None and kind is not None:
        raise TeacherError(
            f"teacher {path} has {family.model}/ with class_embed_type {kind} and no "
            "num_class_embeds: no pipeline gives it labels; expected num_class_embeds"
        )
    if count is not None and not family.takes("class_labels"):
        raise TeacherError(
            f"teacher {path} is a {family.pipeline}, which gives its network no labels, and the "
            f"network needs them (num_class_embeds {count}); save it as a ConsistencyModelPipeline "
            "with the same network and scheduler"
        )


def check_output(path: str | Path, family: Family) -> None:
    """Raises `TeacherError` for a UNet that gives more than its prediction: a learned variance, as
    of Improved DDPM, which no loss here knows."""
    config = part_config(path, family.model)
    channels = config.get("in_channels"), config.get("out_channels")
    if family.model == "unet" and channels[0] != channels[1]:
        raise TeacherError(
            f"teacher {path} has a {family.model} of {channels[0]} channels in and {channels[1]} "
            "out (a learned variance?); expected as many out as in"
        )


def present(path: str | Path, family: Family) -> tuple[str, ...]:
    """The family's parts that the folder has; a text encoder without its tokenizer is no part."""
    there = {part for part in family.parts if (Path(path) / part).exists()}
    for part in family.optional:
        other = _BELONGS_TO.get(part)
        if other and other not in there:
            there.discard(part)
    return tuple(part for part in family.parts if part in there)


def left_out(path: str | Path, family: Family) -> dict[str, None]:
    """The optional components that the folder does not have, as `from_pretrained` is told them."""
    absent = set(family.optional) - set(present(path, family)) - {CLASSES}
    return dict.fromkeys(sorted(absent))


_BELONGS_TO = {"text_encoder_3": "tokenizer_3", "tokenizer_3": "text_encoder_3"}


def _named(family: Family) -> str:
    names = [f"{part} (optional)" if part in family.optional else part for part in family.parts]
    return ", ".join(names)
