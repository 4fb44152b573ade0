"""The `train.health` section: which numbers of a training mean that it is collapsing, and what is
done about it."""

from typing import Literal

from pydantic import Field, model_validator

from pipelines.config import NotNegative, Positive, Section

# The samples against the teacher's own latents: known only where the run reads pairs.
PairMetric = Literal["sample_mean_shift", "sample_std_ratio"]
PAIR_METRICS: tuple[PairMetric, ...] = ("sample_mean_shift", "sample_std_ratio")
HealthMetric = Literal[
    "loss_dm",
    "loss_reg",
    "loss_gan",
    "loss_fake",
    "loss_discriminator",
    "loss_r1",
    "sample_mean",
    "sample_std",
    "sample_mean_shift",
    "sample_std_ratio",
    "grad_ratio_reg_dm",
    "generator_grad_norm",
    "fake_grad_norm",
    "nonfinite_entries",
    "nonfinite_updates",
]
Action = Literal["warn", "rollback", "stop"]


class HealthRule(Section):
    """Violated by a logged line whose `metric` is beyond the bound, or is not finite.

    A line without the metric (a loss that the stage does not have) says nothing either way.
    """

    metric: HealthMetric
    below: float | None = Field(default=None, allow_inf_nan=False)
    above: float | None = Field(default=None, allow_inf_nan=False)
    windows: Positive = Field(default=1, description="logged lines in a row")
    action: Action

    @model_validator(mode="after")
    def _one_bound(self) -> "HealthRule":
        if (self.below is None) == (self.above is None):
            raise ValueError(f"{self.metric}: expected exactly one of below and above")
        return self

    @property
    def bound(self) -> str:
        side, limit = ("below", self.below) if self.below is not None else ("above", self.above)
        return f"{self.metric} {side} {limit:g}"

    @property
    def words(self) -> str:
        """`sample_std_ratio below 0.3 on 3 logged lines in a row`."""
        if self.windows == 1:
            return f"{self.bound} on a logged line"
        return f"{self.bound} on {self.windows} logged lines in a row"


_OF_ALL = (HealthRule(metric="nonfinite_entries", above=0, windows=3, action="warn"),)
_WITHOUT_PAIRS = (HealthRule(metric="sample_std", below=1e-3, windows=10, action="stop"),)
_WITH_PAIRS = (
    HealthRule(metric="sample_std_ratio", below=0.3, windows=3, action="warn"),
    HealthRule(metric="sample_std_ratio", above=3, windows=3, action="warn"),
    HealthRule(metric="sample_mean_shift", above=1, windows=3, action="warn"),
    HealthRule(metric="sample_std_ratio", below=0.05, windows=10, action="stop"),
    HealthRule(metric="sample_mean_shift", above=5, windows=10, action="stop"),
)


class HealthSection(Section):
    """Rules, and what a rollback changes, so that the same steps do not fail the same way."""

    rules: tuple[HealthRule, ...] | None = Field(
        default=None,
        description="empty: warn of a collapse of the samples and stop at a plain one; []: none. "
        "sample_mean_shift and sample_std_ratio compare with the pairs' latents",
    )
    warmup_steps: NotNegative = Field(default=500, description="rules are not asked up to this")
    max_rollbacks: NotNegative = Field(
        default=3, description="of the whole run; one more is a stop in its place"
    )
    fake_updates_factor: float = Field(
        default=1.5, ge=1, allow_inf_nan=False,
        description="each rollback multiplies fake_updates by it, rounded up",
    )  # fmt: skip
    learning_rate_factor: float = Field(
        default=0.5, gt=0, le=1, description="each rollback multiplies both learning rates by it"
    )

    @model_validator(mode="after")
    def _rollback_changes_something(self) -> "HealthSection":
        if self.rolls_back and self.fake_updates_factor == self.learning_rate_factor == 1:
            raise ValueError(
                "a rule rolls back, but fake_updates_factor and learning_rate_factor are both 1: "
                "the same steps would follow with the same random numbers"
            )
        return self

    @property
    def rolls_back(self) -> bool:
        return any(rule.action == "rollback" for rule in self.rules or ())

    def asked(self, has_pairs: bool) -> tuple[HealthRule, ...]:
        """The rules of a run that reads pairs, or reads none."""
        if self.rules is not None:
            return self.rules
        return _OF_ALL + (_WITH_PAIRS if has_pairs else _WITHOUT_PAIRS)


def check_health(section: HealthSection, has_pairs: bool) -> None:
    """Raises ValueError for a rule that compares with pairs in a run that reads none."""
    for index, rule in enumerate(section.rules or ()):
        if rule.metric in PAIR_METRICS and not has_pairs:
            raise ValueError(
                f"train.health.rules.{index}: {rule.metric} compares with the latents of the "
                "pairs, and this run reads none by default (every stage has lambda_reg 0 or names "
                "its pairs_version); use sample_mean or sample_std"
            )
