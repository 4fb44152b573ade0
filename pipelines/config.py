"""Every setting of a run, validated before anything starts.

The recipe (YAML) is read by `jobs.config`; each section here is what one stage receives.
Unknown keys, wrong types and impossible values are errors that name the key.
"""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipelines.pixel_settings import PixelTrainSection
from pipelines.placement import GroupPlacementSection, PlacementSection
from pipelines.section import Section

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
# YAML reads a bare `no` as false.
MixedPrecision = Annotated[
    Literal["no", "bf16"], BeforeValidator(lambda value: "no" if value is False else value)
]

Solver = Literal[
    "ddim", "pndm", "dpmsolver++", "unipc", "heun", "euler", "flow_euler", "edm_heun", "edm_euler",
    "edm_dpmsolver++",
]  # fmt: skip


class RunSection(Section):
    """What belongs to the whole run."""

    dir: str = Field(default="runs/run", description="run directory: a local path or s3:// URL")
    seed: NotNegative = 0


NO_CREDENTIALS = (
    "a store URL must not hold credentials; put them into the environment "
    "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role)"
)
_UP_TO_HOST = re.compile(r"^(\w*://)?.*@", re.DOTALL)


class StorageSection(Section):
    """Options for s3:// URLs. Credentials come from the environment, never from here."""

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _credentials_unsaid(cls, given: Any) -> Any:
        """An error shows the value it refuses: make it one that may be shown."""
        if not isinstance(given, dict) or not isinstance(given.get("endpoint_url"), str):
            return given
        return given | {"endpoint_url": _UP_TO_HOST.sub(r"\1…@", given["endpoint_url"])}

    @field_validator("endpoint_url")
    @classmethod
    def _plain_endpoint(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if "@" in url:
            raise ValueError(NO_CREDENTIALS)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError("expected http://host:port or https://host")
        return url


class RaySection(Section):
    """Where Ray runs. No address: an embedded Ray on this machine, or the job's own cluster."""

    address: str | None = None
    num_cpus: Positive = Field(
        default=8, description="logical CPUs of the embedded Ray (slots, not cores)"
    )
    object_store_mb: Positive = 256
    autoscaling: bool | None = Field(
        default=None,
        description="are nodes started on demand? What no node can run yet is waited for (true), "
        "waited for with a warning (empty), or refused (false, and always by an embedded Ray)",
    )

    @field_validator("address")
    @classmethod
    def _no_job_server(cls, address: str | None) -> str | None:
        if address and address.startswith(("http://", "https://")):
            raise ValueError(
                "a job server's URL; expected host:port or auto. To run on that cluster, use "
                "`dmd submit --address`"
            )
        return address


class TeacherSection(Section):
    """The teacher: a diffusers pipeline, from wherever it lies (docs/teachers.md)."""

    path: str = Field(
        default="shipped:emoji",
        description="a pipeline folder or an s3:// URL of one, org/name of a hub, a single-file "
        ".safetensors checkpoint, or shipped:emoji",
    )
    revision: str | None = Field(
        default=None, description="of a hub's model: the 40 hexadecimal digits of a commit"
    )
    variant: str | None = Field(
        default=None,
        pattern=r"^\w+$",
        description="of the weight files, as diffusers names them: fp16 reads *.fp16.safetensors",
    )
    single_file_config: str | None = Field(
        default=None,
        description="for a single-file checkpoint: a pipeline folder whose configuration and "
        "tokenizers it is loaded with (a path, s3:// URL, or org/name@<commit>)",
    )


class ActorRange(Section):
    """A pool that grows with the work and shrinks without it."""

    min: Positive = 1
    max: Positive

    @model_validator(mode="after")
    def _ascending(self) -> "ActorRange":
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is less than min ({self.min})")
        return self


class PairsSection(Section):
    """Station 1-4: prompts → noise–latent pairs."""

    prompts: str | tuple[str, ...] = Field(
        default="shipped:demo",
        description="txt, csv, jsonl or parquet; paths, globs or s3:// URLs, one or several",
    )
    prompt_column: str = "prompt"
    root: str = Field(default="", description="data set folder; empty: <run.dir>/pairs")
    seed: NotNegative = Field(
        default=0, description="data-set seed: part of every pair's id and noise"
    )
    samples_per_prompt: Positive = 1
    solver: Solver = "dpmsolver++"
    steps: Positive = 50
    guidance_scale: float = Field(default=7.5, ge=0, description="standard scale: u + s (c - u)")
    negative_prompt: str = ""
    height: Positive | None = Field(
        default=None, description="pixels; empty: the teacher's own size"
    )
    width: Positive | None = None
    dtype: Literal["float16", "float32"] = Field(
        default="float16", description="of the stored tensors"
    )
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = Field(
        default=False,
        description="torch.compile the teacher's network: a worker starts later and is faster then",
    )
    batch_size: Positive = 16
    rows_per_block: Positive = Field(
        default=64, description="unit of work and of lost work, and rows of a file"
    )
    row_group_rows: Positive = 64
    actors: Positive | ActorRange = Field(
        default=1, description="teachers: a number, or {min: 1, max: 8} to grow and shrink"
    )
    attempts: Positive = Field(default=3, description="of a row that raises, before it is rejected")
    lease_seconds: float = Field(
        default=30, gt=0, description="a writer that gave no sign for so long is taken for dead"
    )
    keep_versions: Positive = Field(
        default=3, description="dmd regenerate keeps so many of the newest, and all pinned ones"
    )
    max_rejected_share: float = Field(
        default=0.01, ge=0, le=1, description="more rejected rows than this: exit code 5"
    )
    cpus_per_actor: float = Field(default=1, ge=0)
    gpus_per_actor: float = Field(
        default=0, ge=0, description="0.5: two teachers share one GPU, and its memory"
    )
    threads_per_actor: Positive | None = Field(
        default=None, description="torch threads; empty: the actor's share of the machine's cores"
    )
    placement: PlacementSection = PlacementSection()

    @property
    def most_actors(self) -> int:
        return self.actors if isinstance(self.actors, int) else self.actors.max

    @model_validator(mode="after")
    def _whole_batches(self) -> "PairsSection":
        if self.rows_per_block % self.batch_size:
            raise ValueError(
                f"rows_per_block ({self.rows_per_block}) must be a multiple of "
                f"batch_size ({self.batch_size}), so that batches are full"
            )
        return self


class EvaluateSection(Section):
    """Station 9: student against teacher on held-out prompts with the same noise."""

    prompts: str = "shipped:held_out"
    max_prompts: Positive | None = None
    seed: NotNegative = Field(default=1000, description="of the noise; other than pairs.seed")
    teacher_steps: Positive | None = Field(default=None, description="empty: pairs.steps")
    few_steps: tuple[Positive, ...] = Field(default=(1, 2, 4), description="teacher baselines")
    batch_size: Positive = 32
    timing_repeats: Positive = 10
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    report_images: Positive = 32
    samples_per_prompt: Positive = Field(
        default=1, description="pictures of each prompt; a class-conditional teacher has few"
    )
    features: Literal["latents", "inception"] = Field(
        default="latents",
        description="what pictures are compared in: latents (of a pixel model, pixels), or the "
        "network of published FID and KID (extra fid)",
    )
    inception: str = Field(
        default="", description="file of that network's weights; empty: of the installed package"
    )
    real: str = Field(
        default="",
        description="what `dmd data cifar10` wrote: teacher and student are compared with these "
        "real pictures; empty: with an independent draw of the teacher",
    )
    clip_model: str = Field(
        default="",
        description="measures the CLIP score with it: a CLIP model folder, an s3:// URL of one, or "
        "org/name@<commit> of a hub",
    )
    actors: Positive = Field(default=1, description="that sample pictures")
    cpus_per_actor: float = Field(default=1, ge=0)
    gpus_per_actor: float = Field(default=0, ge=0)
    placement: PlacementSection = Field(
        default=PlacementSection(), description="also of the evaluations beside a training"
    )

    @model_validator(mode="after")
    def _real_pictures_as_features(self) -> "EvaluateSection":
        if self.real and self.features != "inception":
            raise ValueError("real needs features: inception")
        return self


_EMOJI_TEACHER = (
    "start_from", "vae_steps", "vae_batch_size", "vae_learning_rate", "timestep_power",
    "skin_tone_weight", "ema_decay", "caption_dropout", "unet_channels", "vae_channels",
)  # fmt: skip


class TeacherTrainSection(Section):
    """`dmd train-teacher`: the miniature Stable Diffusion, or a pixel teacher for CIFAR-10."""

    data: Literal["emoji", "cifar10"] = "emoji"
    pixel: PixelTrainSection = Field(
        default=PixelTrainSection(), description="with data: cifar10, in place of the vae_ keys"
    )
    output: str = Field(default="", description="pipeline folder; empty: <run.dir>/teacher")
    image_size: Literal[32, 64] = 32
    num_workers: Positive = 1
    use_gpu: bool = False
    placement: GroupPlacementSection = GroupPlacementSection()
    threads_per_worker: Positive | None = Field(
        default=None, description="torch threads; empty: the worker's share of the machine's cores"
    )
    max_failures: NotNegative = 3
    max_pictures: Positive | None = Field(
        default=None, description="train on the first so many only"
    )
    start_from: str = Field(
        default="",
        description="pipeline folder or shipped:emoji whose VAE and vocabulary are kept and whose "
        "UNet and text encoder train on; empty: random weights",
    )
    vae_steps: NotNegative = Field(default=4000, description="0 with start_from")
    vae_batch_size: Positive = 64
    vae_learning_rate: Rate = 1e-3
    unet_steps: Positive = 20000
    unet_batch_size: Positive = 64
    unet_learning_rate: Rate = 1e-3
    timestep_power: Rate = Field(
        default=1.0, description="t = 1000 u^power, u uniform; below 1: noisy times more often"
    )
    skin_tone_weight: float = Field(
        default=0.5, gt=0, le=1, description="weight of a picture, for each skin tone in it"
    )
    lr_warmup_steps: NotNegative = 200
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    mixed_precision: MixedPrecision = "bf16"
    max_grad_norm: Rate = 1.0
    checkpointing_steps: Positive = 500
    logging_steps: Positive = 50
    unet_channels: tuple[Positive, Positive] = (96, 192)
    vae_channels: tuple[Positive, Positive, Positive] = (32, 64, 96)

    @property
    def total_steps(self) -> int:
        return self.unet_steps + (self.vae_steps if self.data == "emoji" else 0)

    @model_validator(mode="after")
    def _keys_of_this_data(self) -> "TeacherTrainSection":
        own = ("pixel",) if self.data == "emoji" else _EMOJI_TEACHER
        defaults = type(self).model_fields
        given = [name for name in own if getattr(self, name) != defaults[name].default]
        if given:
            raise ValueError(f"{', '.join(given)}: not for data: {self.data}; leave it out")
        return self

    @model_validator(mode="after")
    def _vae_trained_or_kept(self) -> "TeacherTrainSection":
        if self.data == "emoji" and bool(self.start_from) != (self.vae_steps == 0):
            raise ValueError(
                f"vae_steps is {self.vae_steps} and start_from is {self.start_from!r}; expected "
                "vae_steps 0 with start_from (its VAE is kept), and more than 0 without"
            )
        return self
