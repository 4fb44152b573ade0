"""The `train` section of a recipe: one set of settings, and stages that change them in order.

Keys keep diffusers' names where the concept exists. Contradictions are errors before any work.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipelines.beside_settings import EvaluationSection
from pipelines.config import MixedPrecision, NotNegative, Positive, Rate, Section
from pipelines.health_settings import HealthSection, check_health
from pipelines.parallel_settings import ParallelSection, WorkerRange
from pipelines.placement import GroupPlacementSection
from pipelines.trackers import TrackerName, tracker_names

RegressionLoss = Literal["l1", "l2", "huber", "lpips", "st-lpips"]
DmWeighting = Literal["normalised", "sigma_over_alpha", "sigma3_over_alpha"]
ScoreWeight = Literal["teacher", "epsilon", "v", "x0", "edm"]
# YAML reads a bare `no` as false.
FollowPairs = Annotated[
    Literal["no", "epoch", "stage"],
    BeforeValidator(lambda value: "no" if value is False else value),
]
# What a stage may wait for: the names of metrics.jsonl that every run has.
StageMetric = Literal[
    "loss_dm",
    "loss_reg",
    "loss_fake",
    "loss_gan",
    "loss_discriminator",
    "sample_mean",
    "sample_std",
]


class StageKeys(Section):
    """What a stage may change. Batch sizes are global; times are fractions of the schedule."""

    train_batch_size: Positive = Field(default=32, description="global batch of the DM gradient")
    regression_batch_size: NotNegative = Field(default=32, description="global batch of pairs")
    learning_rate: Rate = 1e-5
    fake_learning_rate: Rate | None = Field(default=None, description="empty: learning_rate")
    dm_weight: float = Field(
        default=1.0, ge=0, description="weight of the distribution-matching loss"
    )
    dm_weighting: DmWeighting = Field(
        default="normalised", description="w_t; the other two are the paper's ablation"
    )
    lambda_reg: float = Field(default=0.25, ge=0, description="weight of the regression loss")
    regression_loss: RegressionLoss = Field(
        default="l2", description="lpips and st-lpips compare decoded pixels, the others latents"
    )
    regression_decoder: str = Field(
        default="vae", description="decodes latents for lpips: vae, or an AutoencoderTiny folder"
    )
    pairs_in_dm: bool = Field(
        default=False, description="outputs on stored noise feed the DM gradient too"
    )
    pairs_version: Positive | None = Field(
        default=None, description="sealed version; empty: the newest when the run starts"
    )
    guidance_scale: float = Field(
        default=7.5, ge=0, description="of the real score; standard scale"
    )
    t_min_fraction: float = Field(default=0.02, ge=0, lt=1)
    t_max_fraction: float = Field(default=0.98, gt=0, le=1)
    fake_updates: Positive = Field(
        default=1, description="fake-score updates per generator update (DMD2: 5 to 10)"
    )
    gan_weight: float = Field(default=0.0, ge=0, description="in the generator's loss (DMD2)")
    gan_fake_weight: float = Field(
        default=1e-2, ge=0, description="of the discriminator in the fake score's loss"
    )
    r1_weight: float = Field(default=0.0, ge=0, description="gradient penalty on real pictures")

    def check(self) -> None:
        """Raises ValueError for settings that contradict each other. Not asked of the `train`
        section itself, whose values a stage may complete, but of every stage."""
        if self.t_min_fraction >= self.t_max_fraction:
            raise ValueError(
                f"t_min_fraction ({self.t_min_fraction}) must be below "
                f"t_max_fraction ({self.t_max_fraction})"
            )
        if self.lambda_reg > 0 and self.regression_batch_size == 0:
            raise ValueError("lambda_reg > 0 needs regression_batch_size > 0")
        if self.pairs_in_dm and not self.needs_pairs:
            raise ValueError("pairs_in_dm needs lambda_reg > 0: there are no pairs without it")
        if self.dm_weight == self.lambda_reg == self.gan_weight == 0:
            raise ValueError(
                "dm_weight, lambda_reg and gan_weight are all 0: there is nothing to train"
            )
        if self.r1_weight > 0 and self.gan_weight == 0:
            raise ValueError("r1_weight > 0 needs gan_weight > 0: there is no discriminator")

    @property
    def needs_pairs(self) -> bool:
        return self.lambda_reg > 0

    @property
    def follows(self) -> bool:
        """Does it read whatever version the run reads by default?"""
        return self.needs_pairs and self.pairs_version is None


class MetricRule(Section):
    """A stage ends when this metric of `metrics.jsonl` passes the bound, or with its steps."""

    metric: StageMetric
    below: float | None = None
    above: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> "MetricRule":
        if (self.below is None) == (self.above is None):
            raise ValueError("expected exactly one of below and above")
        return self

    def holds(self, value: float) -> bool:
        return value < self.below if self.below is not None else value > (self.above or 0.0)


class StageSection(Section):
    """One stage: when it ends, and what it changes from the `train` section's own values."""

    name: str = ""
    steps: Positive | None = Field(default=None, description="ends after so many steps")
    samples: Positive | None = Field(
        default=None, description="or after so many samples of the DM batch"
    )
    until: MetricRule | None = Field(default=None, description="or earlier, by a metric")

    train_batch_size: Positive | None = None
    regression_batch_size: NotNegative | None = None
    learning_rate: Rate | None = None
    fake_learning_rate: Rate | None = None
    dm_weight: float | None = Field(default=None, ge=0)
    dm_weighting: DmWeighting | None = None
    lambda_reg: float | None = Field(default=None, ge=0)
    regression_loss: RegressionLoss | None = None
    regression_decoder: str | None = None
    pairs_in_dm: bool | None = None
    pairs_version: Positive | None = None
    guidance_scale: float | None = Field(default=None, ge=0)
    t_min_fraction: float | None = Field(default=None, ge=0, lt=1)
    t_max_fraction: float | None = Field(default=None, gt=0, le=1)
    fake_updates: Positive | None = None
    gan_weight: float | None = Field(default=None, ge=0)
    gan_fake_weight: float | None = Field(default=None, ge=0)
    r1_weight: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _ends(self) -> "StageSection":
        if (self.steps is None) == (self.samples is None):
            raise ValueError("a stage ends by one of steps and samples (until may be added)")
        return self

    def changes(self) -> dict[str, object]:
        """The settings this stage gives, without those that say when it ends."""
        given = self.model_dump(exclude_none=True)
        return {key: given[key] for key in StageKeys.model_fields if key in given}


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
        default=10, description="updates left out for a non-finite gradient before the run fails"
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
            where = f"stages.{index}" if self.stages else "train"
            for key in ("train_batch_size", "regression_batch_size"):
                size = getattr(keys, key)
                if 0 < size < self.most_workers:
                    raise ValueError(
                        f"{where}: {key} ({size}) must be at least num_workers "
                        f"({self.most_workers})"
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
        return self

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


def stage_steps(stage: StageSection, keys: StageKeys) -> int:
    """The most steps a stage takes."""
    if stage.steps is not None:
        return stage.steps
    return -(-(stage.samples or 0) // keys.train_batch_size)
