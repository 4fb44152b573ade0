"""What a stage of training may change, and when it ends.

Keys keep diffusers' names where the concept exists.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pipelines.config import NotNegative, Positive, Rate, Section

RegressionLoss = Literal["l1", "l2", "huber", "lpips", "st-lpips"]
DmWeighting = Literal["normalised", "sigma_over_alpha", "sigma3_over_alpha"]
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


def _guiding(scale: float) -> float:
    """Pipelines take 0 for no guidance. Here it would be the score without a prompt."""
    if not scale >= 1:
        raise ValueError("expected 1 (no guidance) or more; 0 would be the score of no prompt")
    return scale


Guidance = Annotated[float, AfterValidator(_guiding)]


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
    guidance_scale: Guidance = Field(
        default=7.5, description="of the real score; standard scale, 1: no guidance"
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
    guidance_scale: Guidance | None = None
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


def stage_steps(stage: StageSection, keys: StageKeys) -> int:
    """The most steps a stage takes."""
    if stage.steps is not None:
        return stage.steps
    return -(-(stage.samples or 0) // keys.train_batch_size)
