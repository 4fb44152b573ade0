"""The teacher: a diffusers pipeline folder, loaded once, seen as noise → samples.

Loading goes through diffusers, from safetensors only, and never contacts a hub. Which pipelines
are taken: `families.py`.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from dmd_core.condition import Condition
from dmd_core.denoiser import NetworkDenoiser, RawNetwork
from dmd_core.diffusers_networks import DiffusersNetwork
from dmd_core.diffusers_schedules import family as schedule_family
from dmd_core.families import (
    CLASSES,
    Family,
    check_labels,
    check_output,
    check_parts,
    family_of,
    folder_geometry,
    left_out,
    part_config,
)
from dmd_core.latents import Geometry, decode_samples, encode_pictures
from dmd_core.ode import integrate, make_scheduler, step_grid
from dmd_core.pipeline_files import check_complete
from dmd_core.precision import hold, stored_dtype
from dmd_core.prompt_encoding import PromptEncoder
from dmd_core.schedule import Schedule
from dmd_core.teacher_files import INDEX, PartFiles, TeacherError, weight_files

__all__ = [
    "Teacher", "TeacherError", "check_teacher", "folder_schedule", "folder_scheduler",
    "load_teacher", "teacher_revision",
]  # fmt: skip


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher on `device`, in float32 unless loaded for bfloat16 alone. `revision`: the
    sha256 of its files.

    `size`: height and width in pixels that training runs at; SDXL's condition and FLUX's noise
    schedule depend on them.
    """

    pipeline: Any
    family: Family
    geometry: Geometry
    schedule: Schedule
    encoder: PromptEncoder
    size: tuple[int, int]
    revision: str

    @property
    def model(self) -> nn.Module:
        """The network that denoises: a UNet or a transformer."""
        return getattr(self.pipeline, self.family.model)

    @property
    def vae(self) -> Any:
        """None: the teacher works on pixels."""
        return None if self.family.on_pixels else self.pipeline.vae

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(C,h,w) of the samples of a height × width picture (default: the teacher's own)."""
        try:
            return self.geometry.shape(height, width)
        except ValueError as error:
            raise TeacherError(str(error)) from error

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The condition of each prompt, B rows. Each distinct prompt is encoded once.

        Raises `IndexError` for a prompt with a token that a text encoder does not know, or that is
        no class.
        """
        return self.encoder.prompts(prompts, self.size)

    def encode_negatives(self, prompts: Sequence[str]) -> Condition:
        """What guidance moves away from, B rows: "" is the family's own default."""
        return self.encoder.negatives(prompts, self.size)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What it was loaded to be used in; the methods below take another one to use it so."""
        return self.encoder.compute_dtype

    def network(self, compute_dtype: torch.dtype | None = None) -> RawNetwork:
        """The network as (x_t, t, cond) → raw output, float32."""
        raw, dtype = DiffusersNetwork(self.model), compute_dtype or self.compute_dtype
        if dtype == torch.float32:
            return raw

        def mixed(x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
            with torch.autocast(x_t.device.type, dtype=dtype):
                return raw(x_t, t, cond).float()

        return mixed

    def denoiser(self, compute_dtype: torch.dtype | None = None) -> NetworkDenoiser:
        dtype = compute_dtype or self.compute_dtype
        return NetworkDenoiser(DiffusersNetwork(self.model), self.schedule, dtype)

    def solve(
        self,
        eps: torch.Tensor,
        prompts: Sequence[str],
        *,
        solver: str,
        steps: int,
        guidance_scale: float,
        negative_prompt: str | Sequence[str] = "",
        compute_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The guided ODE from ε (B,C,h,w) to x₀ (B,C,h,w), float32, on `device`.

        `negative_prompt`: one for all rows, or one for each. `compute_dtype`: of the network and
        the text encoders; the ODE is integrated in float32.
        """
        size, tokens = self.geometry.pixels(eps.shape), self.geometry.image_tokens(eps.shape)
        encoder = replace(self.encoder, compute_dtype=compute_dtype or self.compute_dtype)
        cond = encoder.prompts(prompts, size)
        uncond = cond.rows(slice(1))  # not looked at without guidance
        if guidance_scale > 1.0 and cond.guidance is None:
            uncond = encoder.negatives(_negatives(negative_prompt, len(eps)), size)
        scheduler = make_scheduler(solver, self.pipeline.scheduler.config, tokens)
        return integrate(
            self.network(compute_dtype),
            scheduler,
            eps.float().to(self.device),
            cond,
            uncond,
            steps=steps,
            guidance_scale=guidance_scale,
            grid=step_grid(scheduler.config, steps, tokens, by_sigmas=self.family.by_sigmas),
        )

    def encode(self, pictures: np.ndarray) -> torch.Tensor:
        """Pictures (B,H,W,3) uint8 → samples (B,C,h,w) float32: the posterior's mean, scaled, or
        the pixels in [−1, 1]."""
        return encode_pictures(self.vae, pictures, self.device)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Samples (B,C,h,w) → pictures (B,H,W,3) uint8."""
        return decode_samples(self.vae, latents, self.device)


def _negatives(given: str | Sequence[str], rows: int) -> list[str]:
    """One for all rows, or one for each."""
    negatives = [given] if isinstance(given, str) else list(given)
    if len(set(negatives)) == 1:
        return negatives[:1]
    if len(negatives) != rows:
        raise ValueError(f"{len(negatives)} negative prompts for {rows} rows")
    return negatives


def load_teacher(
    path: str,
    *,
    device: str | torch.device = "cpu",
    network_device: str | torch.device = "",
    size: tuple[int | None, int | None] = (None, None),
    compute_dtype: torch.dtype = torch.float32,
    to_train: bool = False,
) -> Teacher:
    """Load a local pipeline folder; raises `TeacherError` that names what is missing.

    `network_device`: where the denoising network lies, if not on `device` (one that is to be
    sharded). `size`: height and width in pixels of the pictures it is used for; None: its own.
    `compute_dtype`: what its text encoders and its network are used in. Bfloat16 keeps their
    matrices in it, so that nothing else can be done with them; but not those of a network that
    copies are made of first, `to_train`.
    """
    check_teacher(path)
    family = family_of(path)
    pipeline = _load_pipeline(path, family)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
            autocast = name.startswith("text_encoder") or (name == family.model and not to_train)
            # Before it needs a place on the device.
            hold(part, compute_dtype if autocast else torch.float32)
            part.to(network_device or device if name == family.model else device)
    if torch.device(device).type == "cuda" and family.model == "unet":  # on a CPU it gains nothing
        pipeline.unet.to(memory_format=torch.channels_last)
    vae = None if family.on_pixels else pipeline.vae.config
    geometry = family.geometry(part_config(path, family.model), vae)
    shape = geometry.shape(*size)
    schedule = Schedule.from_scheduler(
        pipeline.scheduler, image_tokens=geometry.image_tokens(shape)
    )
    return Teacher(
        pipeline,
        family,
        geometry,
        schedule,
        PromptEncoder(family, pipeline, torch.device(device), class_names(path), compute_dtype),
        geometry.pixels(shape),
        teacher_revision(path),
    )


def _load_pipeline(path: str, family: Family) -> Any:
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    # It would say of every long prompt that its end is not read.
    logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)
    absent: dict[str, Any] = dict(left_out(path, family))
    if family.pipeline == "StableDiffusionPipeline":
        absent |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = family.pipeline_class.from_pretrained(
            path, dtype=_stored(path, family), use_safetensors=True, local_files_only=True, **absent
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise TeacherError(
            f"teacher {path} cannot be loaded: {error}{_by_sentencepiece(path, family)}"
        ) from error
    for name, part in pipeline.components.items():
        if name.startswith("text_encoder") and part is not None:
            check_complete(Path(path) / name, part)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _stored(path: str, family: Family) -> dict[str, torch.dtype]:
    """Part → the dtype of its files: what is published in float16 would take twice the memory of
    its files while it is loaded in float32, in every process."""
    parts = {part: weight_files(Path(path) / part) for part in family.parts}
    return {part: stored_dtype(files) for part, files in parts.items() if files}


def all_weights(path: str) -> list[Path]:
    """Of all parts of a teacher's folder."""
    return [file for part in family_of(path).parts for file in weight_files(Path(path) / part)]


def _by_sentencepiece(path: str, family: Family) -> str:
    """What transformers does not say of a tokenizer that it could not read."""
    parts = [Path(path) / part for part in family.parts if part.startswith("tokenizer")]
    alone = [
        f"{part.name}/spiece.model"
        for part in parts
        if (part / "spiece.model").is_file() and not (part / "tokenizer.json").is_file()
    ]
    if not alone:
        return ""
    return (
        f" ({' and '.join(alone)}: expected a model that sentencepiece, a dependency, can read; is "
        "it installed, and the file whole?)"
    )


def class_names(path: str) -> tuple[str, ...]:
    """Of a class-conditional teacher, by label; empty where its folder names none."""
    file = Path(path) / CLASSES
    if not file.is_file():
        return ()
    try:
        names = json.loads(file.read_text())
    except ValueError as error:
        raise TeacherError(f"{file} is not JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TeacherError(f"{file} is not a list of names; expected one for every class, in order")
    return tuple(names)


def folder_scheduler(path: str | Path) -> Any:
    """A teacher's scheduler, without its weights. Raises `TeacherError`."""
    config = part_config(path, "scheduler")
    scheduler = getattr(diffusers, str(config.get("_class_name")), None)
    if scheduler is None:
        raise TeacherError(f"{path}/scheduler is a {config.get('_class_name')}, not of diffusers")
    try:
        return scheduler.from_config(config)
    except ImportError as error:  # some need a package more
        raise TeacherError(f"{path}/scheduler cannot be used here: {error}") from error


def folder_schedule(path: str | Path) -> Schedule:
    """A teacher's noise schedule at its own size, without its weights. Raises ValueError."""
    own = folder_geometry(path)
    tokens = own.image_tokens(own.shape())
    return Schedule.from_scheduler(folder_scheduler(path), image_tokens=tokens)


def check_teacher(path: str) -> None:
    """Fail at the door: is this a pipeline folder of a family we know, with every part in it?"""
    family = family_of(path)
    check_parts(path, family)
    check_labels(path, family)
    check_output(path, family)
    class_names(path)
    scheduler = part_config(path, "scheduler")
    kind = schedule_family(scheduler.get("_class_name", ""), scheduler)
    if family.on_pixels and kind not in family.schedules:
        raise TeacherError(
            f"teacher {path} is a {family.pipeline} with a {scheduler.get('_class_name')}, which "
            "that pipeline cannot run; expected a ConsistencyModelPipeline, or a DDPM or DDIM "
            "scheduler"
        )


def teacher_revision(path: str) -> str:
    """sha256 over names and contents of the files that make the teacher what it is: those that are
    loaded, whatever else lies beside them."""
    folder, digest = Path(path), hashlib.sha256()
    for file in _read_of(folder):
        with open(folder / file, "rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file} {content}\n".encode())
    return digest.hexdigest()


def _read_of(folder: Path) -> Iterator[str]:
    yield INDEX
    for part in family_of(folder).parts:
        if (folder / part).is_file():  # names of classes
            yield part
        for name in PartFiles.in_folder(folder / part).loaded():
            yield f"{part}/{name}"
