"""The `train.evaluation` section: checkpoints are evaluated while the training goes on."""

from typing import Annotated, Literal

from pydantic import Field

from pipelines.config import NotNegative, Positive, Section

EvaluationMetric = Literal["kid", "rmse", "retrieval"]
# The confidence intervals are over prompts.
FEWEST = 10


class EvaluationSection(Section):
    """Evaluation beside the training, with the metrics and the prompts of `dmd evaluate`."""

    steps: NotNegative = Field(
        default=0,
        description="evaluate the checkpoints of these steps; a multiple of checkpointing_steps; "
        "0: never",
    )
    max_prompts: Annotated[int, Field(ge=FEWEST)] = Field(
        default=128, description="the first so many of evaluate.prompts"
    )
    metric: EvaluationMetric = Field(
        default="kid", description="which checkpoint is the best; retrieval: share at k = 1"
    )
    patience: Positive | None = Field(
        default=None, description="end after so many evaluations without a better value"
    )
    best_checkpoints_limit: Positive = Field(
        default=1, description="kept beside the newest, whatever checkpoints_total_limit says"
    )
    waiting_checkpoints_limit: Positive = Field(
        default=3, description="kept until they are evaluated; further ones may go unevaluated"
    )
    num_cpus: float = Field(default=1, ge=0, description="of an evaluation; it waits for them")
    num_gpus: float = Field(default=0, ge=0)

    def check(self, checkpointing_steps: int) -> None:
        """Raises ValueError where no checkpoint would be evaluated, or only some."""
        if self.steps % checkpointing_steps:
            raise ValueError(
                f"evaluation.steps ({self.steps}) must be a multiple of checkpointing_steps "
                f"({checkpointing_steps}): checkpoints are what is evaluated"
            )
