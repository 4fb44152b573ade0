"""The `train` section of a recipe: one set of settings, and stages that change them in order.

Keys keep diffusers' names where the concept exists. Contradictions are errors before any work.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipelines.beside_settings import EvaluationSection
from pipelines.config import MixedPrecision, NotNegative, Positive, Rate
from pipelines.health_settings import HealthSection, check_health
from pipelines.parallel_settings import ParallelSection, WorkerRange
from pipelines.placement import GroupPlacementSection
from pipelines.stage_settings import StageKeys, StageSection, stage_steps
from pipelines.trackers import TrackerName, tracker_names

ScoreWeight = Literal["teacher", "epsilon", "v", "x0", "edm"]
# YAML reads a bare `no` as false.
FollowPairs = Annotated[
    Literal["no", "epoch", "stage"],
    BeforeValidator(lambda value: "no" if value is False else value),
]


class TrainSection(StageKeys):
    """Stations 5-7: DMD training. Without `stages` it is one stage of `max_train_steps`."""

    num_workers: Positive | WorkerRange = Field(
        default=1, description="a number, or {min: …, max: …}: elastic"
    )
    micro_batch_size: Positive | None = Field(
        default=None,
        description="most samples of each batch in one pass of a worker; the rest is accumulated. "
        "Batches stay global: this changes memory, not the result",
    )
    parallel: ParallelSection = ParallelSection()
    use_gpu: bool = False
    cpus_per_worker: float = Field(default=1, ge=0)
    placement: GroupPlacementSection = GroupPlacementSection()
    threads_per_worker: Positive | None = Field(
        default=None, description="torch threads; empty: the worker's share of the machine's cores"
    )
    max_failures: NotNegative = 3
    max_train_steps: Positive | None = Field(
        default=None, description="empty: 1000, or what the stages add up to"
    )
    stages: tuple[StageSection, ...] = ()
    student_timesteps: tuple[NotNegative, ...] | None = Field(
        default=None,
        description="times the student is called at; empty: the last one. "
        "[999, 749, 499, 249]: DMD2's four steps; [399]: one step told an earlier time",
    )
    follow_pairs: FollowPairs = Field(
        default="no",
        description="take the newest sealed version of the pairs at the end of each epoch, or at "
        "the start of each stage; stages with a pairs_version stay with it",
    )
    unpaired_prompts: str = Field(
        default="",
        description="prompt file of the DM stream; empty: the pairs' prompts, or pairs.prompts "
        "where no stage needs pairs",
    )
    real_pictures: str = Field(
        default="",
        description="for the GAN: a folder (with metadata.jsonl), Parquet files, or emoji: "
        "the pictures the shipped teacher was trained on",
    )
    trainable: Literal["full", "lora"] = "full"
    lora_rank: Positive = 64
    lora_alpha: Positive = 64
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    ema_halflife_samples: Rate | None = Field(
        default=None, description="of the student's moving average; empty: none, as in the paper"
    )
    mixed_precision: MixedPrecision = "no"
    fake_loss_weight: ScoreWeight = Field(
        default="teacher", description="over t; teacher: the loss the teacher was trained with"
    )
    perceptual_trunk: str = Field(
        default="", description="VGG-16 weights for lpips (torchvision's state dict)"
    )
    perceptual_resize: NotNegative = Field(
        default=224, description="smaller pictures are enlarged to it for lpips; 0: as they are"
    )
    lr_scheduler: Literal["constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"
    lr_warmup_steps: NotNegative = 500
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: Rate = 10.0
    max_nonfinite_updates: NotNegative = Field(
        default=10,
        description="updates of a network in a row that may be left out for a non-finite gradient",
    )
    checkpointing_steps: Positive = 500
    checkpoints_total_limit: Positive = 2
    validation_steps: Positive = 500
    num_validation_images: Positive = 16
    logging_steps: Positive = 10
    report_to: TrackerName | tuple[TrackerName, ...] = Field(
        default="tensorboard", description="tensorboard, wandb, a list of both, or none"
    )
    health: HealthSection = HealthSection()
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _stages_fit(self) -> "TrainSection":
        if self.stages and self.max_train_steps is not None:
            raise ValueError(
                "max_train_steps and stages are both given; the stages' own steps add up"
            )
        if self.follow_pairs != "no" and not any(keys.follows for _, keys in self.plan()):
            raise ValueError(
                f"follow_pairs is {self.follow_pairs}, but there is nothing to follow: every stage "
                "has lambda_reg 0 or names its pairs_version"
            )
        check_health(self.health, has_pairs=any(keys.follows for _, keys in self.plan()))
        self.evaluation.check(self.checkpointing_steps)
        tracker_names(self.report_to)
        times = self.student_timesteps
        if times is not None and (not times or list(times) != sorted(set(times), reverse=True)):
            raise ValueError(f"student_timesteps {list(times)} must be falling times")
        for index, (stage, keys) in enumerate(self.plan()):
            self._check_stage(f"stages.{index}" if self.stages else "train", stage, keys)
        return self

    def _check_stage(self, where: str, stage: StageSection, keys: StageKeys) -> None:
        """What a stage asks of the whole section."""
        for key in ("train_batch_size", "regression_batch_size"):
            size = getattr(keys, key)
            if 0 < size < self.most_workers:
                raise ValueError(
                    f"{where}: {key} ({size}) must be at least num_workers ({self.most_workers})"
                )
        if keys.gan_weight > 0 and not self.real_pictures:
            raise ValueError(f"{where}: gan_weight > 0 needs train.real_pictures")
        metric = stage.until.metric if stage.until else ""
        if stage.until and self.checkpointing_steps % self.logging_steps:
            raise ValueError(
                f"{where}: until needs checkpointing_steps ({self.checkpointing_steps}) to be "
                f"a multiple of logging_steps ({self.logging_steps}), so that a resumed run "
                "averages the metric over the same steps"
            )
        if metric == "loss_dm" and keys.dm_weight == 0:
            raise ValueError(f"{where}: until loss_dm needs dm_weight > 0")
        if metric in ("loss_gan", "loss_discriminator") and keys.gan_weight == 0:
            raise ValueError(f"{where}: until {metric} needs gan_weight > 0")
        if metric == "loss_reg" and keys.lambda_reg == 0:
            raise ValueError(f"{where}: until loss_reg needs lambda_reg > 0")

    def plan(self) -> list[tuple[StageSection, StageKeys]]:
        """Every stage with its complete settings, checked; an error names the stage."""
        base = {key: getattr(self, key) for key in StageKeys.model_fields}
        only = StageSection(name="train", steps=self.max_train_steps or 1000)
        plan = []
        for index, stage in enumerate(self.stages or (only,)):
            keys = StageKeys.model_validate(base | stage.changes())
            try:
                keys.check()
            except ValueError as error:
                name = f"stages.{index} ({stage.name or 'unnamed'}): " if self.stages else ""
                raise ValueError(f"{name}{error}") from None
            plan.append((stage, keys))
        return plan

    @property
    def group_size(self) -> int | tuple[int, int]:
        """As Ray Train takes it."""
        workers = self.num_workers
        return (workers.min, workers.max) if isinstance(workers, WorkerRange) else workers

    @property
    def most_workers(self) -> int:
        workers = self.num_workers
        return workers.max if isinstance(workers, WorkerRange) else workers

    @property
    def total_steps(self) -> int:
        """Steps of all stages; a stage that ends by a metric may take fewer."""
        return sum(stage_steps(stage, keys) for stage, keys in self.plan())

    @property
    def needs_pairs(self) -> bool:
        return any(keys.needs_pairs for _, keys in self.plan())

    @property
    def uses_gan(self) -> bool:
        return any(keys.gan_weight > 0 for _, keys in self.plan())
