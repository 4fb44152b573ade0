"""The teacher: a Stable Diffusion pipeline folder, loaded once, seen as noise → latents.

Loading goes through diffusers, from safetensors only, and never contacts a hub.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionPipeline

from dmd_core.condition import Condition
from dmd_core.denoiser import DiffusersNetwork, NetworkDenoiser, RawNetwork
from dmd_core.ode import integrate, make_scheduler
from dmd_core.schedule import Schedule
from dmd_core.teacher_training import pictures_to_tensor

_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


class TeacherError(ValueError):
    """A teacher folder that cannot be used."""


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher on `device`, in float32. `revision` is the sha256 of its files."""

    pipeline: StableDiffusionPipeline
    schedule: Schedule
    device: torch.device
    revision: str

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(C, h, w) of the latents of a height × width picture (default: the teacher's own)."""
        factor = self.pipeline.vae_scale_factor
        own = self.pipeline.unet.config.sample_size * factor
        for name, value in (("height", height), ("width", width)):
            if value is not None and value % factor:
                raise TeacherError(f"{name} is {value}; expected a multiple of {factor}")
        channels = self.pipeline.unet.config.in_channels
        return channels, (height or own) // factor, (width or own) // factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The condition of each prompt, B rows. Each distinct prompt is encoded once.

        Raises `IndexError` for a prompt with a token that the text encoder does not know.
        """
        distinct = sorted(set(prompts))
        tokens = self.pipeline.tokenizer(
            distinct,
            padding="max_length",
            max_length=self.pipeline.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        encoder = self.pipeline.text_encoder
        _check_tokens(distinct, tokens.input_ids, encoder.get_input_embeddings().num_embeddings)
        # As StableDiffusionPipeline does: a mask only where the encoder's configuration asks.
        mask = None
        if getattr(encoder.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(self.device)
        embeddings = encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]
        row = {prompt: index for index, prompt in enumerate(distinct)}
        return Condition(text=embeddings[[row[prompt] for prompt in prompts]])

    def network(self, compute_dtype: torch.dtype = torch.float32) -> RawNetwork:
        """The UNet as (x_t, t, cond) → raw output (ε or v), float32."""
        raw = DiffusersNetwork(self.pipeline.unet)
        if compute_dtype == torch.float32:
            return raw

        def mixed(x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
            with torch.autocast(x_t.device.type, dtype=compute_dtype):
                return raw(x_t, t, cond).float()

        return mixed

    def denoiser(self, compute_dtype: torch.dtype = torch.float32) -> NetworkDenoiser:
        return NetworkDenoiser(DiffusersNetwork(self.pipeline.unet), self.schedule, compute_dtype)

    def solve(
        self,
        eps: torch.Tensor,
        prompts: Sequence[str],
        *,
        solver: str,
        steps: int,
        guidance_scale: float,
        negative_prompt: str | Sequence[str] = "",
        compute_dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """The guided ODE from ε (B,C,h,w) to latents x₀ (B,C,h,w), float32, on `device`.

        `negative_prompt`: one for all rows, or one for each.
        """
        negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(set(negatives)) == 1:
            negatives = negatives[:1]
        elif len(negatives) != len(eps):
            raise ValueError(f"{len(negatives)} negative prompts for {len(eps)} rows")
        return integrate(
            self.network(compute_dtype),
            make_scheduler(solver, self.pipeline.scheduler.config),
            eps.float().to(self.device),
            self.encode_prompts(prompts),
            self.encode_prompts(negatives),
            steps=steps,
            guidance_scale=guidance_scale,
        )

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> torch.Tensor:
        """Pictures (B,H,W,3) uint8 → latents (B,C,h,w) float32: the posterior's mean, scaled."""
        vae = self.pipeline.vae
        pixels = pictures_to_tensor(pictures).to(self.device)
        return vae.encode(pixels).latent_dist.mean.float() * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Latents (B,C,h,w) → pictures (B,H,W,3) uint8."""
        vae = self.pipeline.vae
        latents = latents.float().to(self.device) / vae.config.scaling_factor
        pictures = vae.decode(latents, return_dict=False)[0]
        pictures = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        return pictures.permute(0, 2, 3, 1).cpu().numpy()


def _check_tokens(prompts: Sequence[str], ids: torch.Tensor, known: int) -> None:
    """Before the ids (B,L) reach a device, where such a lookup would end the whole process."""
    for prompt, highest in zip(prompts, ids.amax(1).tolist(), strict=True):
        if highest >= known:
            raise IndexError(
                f"prompt {prompt[:80]!r} has token {highest}, but the text encoder knows {known} "
                "tokens (0 is the first): tokenizer and text encoder do not fit together"
            )


def load_teacher(
    path: str, *, device: str | torch.device = "cpu", network_device: str | torch.device = ""
) -> Teacher:
    """Load a local pipeline folder; raises `TeacherError` that names what is missing.

    `network_device`: where the UNet lies, if not on `device` (one that is to be sharded).
    """
    check_teacher(path)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            path,
            safety_checker=None,
            requires_safety_checker=False,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
        )
    except OSError as error:
        raise TeacherError(f"teacher {path} cannot be loaded: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.vae, pipeline.text_encoder):
        part.to(device)
    pipeline.unet.to(network_device or device)
    for part in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        part.eval().requires_grad_(False)
    if torch.device(device).type == "cuda":  # on a CPU it gains nothing
        pipeline.unet.to(memory_format=torch.channels_last)
    schedule = Schedule.from_scheduler(pipeline.scheduler)
    return Teacher(pipeline, schedule, torch.device(device), teacher_revision(path))


def check_teacher(path: str) -> None:
    """Fail at the door: is this a Stable Diffusion pipeline folder with every part in it?"""
    folder = Path(path)
    index = folder / "model_index.json"
    if not index.is_file():
        raise TeacherError(
            f"teacher {path} has no model_index.json; expected a diffusers pipeline folder "
            "(as written by save_pretrained)"
        )
    try:
        class_name = json.loads(index.read_text()).get("_class_name")
    except ValueError as error:
        raise TeacherError(f"{index} is not JSON: {error}") from error
    if class_name != "StableDiffusionPipeline":
        raise TeacherError(
            f"teacher {path} is a {class_name}; this version distils StableDiffusionPipeline"
        )
    for part in _PARTS:
        if not (folder / part).is_dir():
            raise TeacherError(
                f"teacher {path} has no folder {part}/; expected {', '.join(_PARTS)}"
            )
    for part in ("vae", "text_encoder", "unet"):
        if not any((folder / part).glob("*.safetensors")):
            raise TeacherError(
                f"teacher {path} has no {part}/*.safetensors (only safetensors are loaded)"
            )


def teacher_revision(path: str) -> str:
    """sha256 over names and contents of the files that make the teacher what it is."""
    folder = Path(path)
    digest = hashlib.sha256()
    for part in ("model_index.json", *_PARTS):
        root = folder / part
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        for file in files:
            with open(file, "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()
