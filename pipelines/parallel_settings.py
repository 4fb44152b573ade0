"""Recipe settings: on how many workers a training runs, and how its networks lie on them."""

from typing import Literal

from pydantic import Field, model_validator

from pipelines.config import Positive, Section


class WorkerRange(Section):
    """An elastic group: as many workers as the cluster has room for, between these."""

    min: Positive
    max: Positive

    @model_validator(mode="after")
    def _ordered(self) -> "WorkerRange":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not be above max ({self.max})")
        return self


class ParallelSection(Section):
    """How the networks lie on the workers."""

    generator: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="ddp: whole on every worker; fsdp: sharded over them (FSDP2)"
    )
    fake: Literal["ddp", "fsdp"] = "ddp"
    teacher: Literal["replicated", "sharded", "offload"] = Field(
        default="replicated", description="offload: sharded over the workers' host memory"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, about a third more time"
    )

    @property
    def shards(self) -> bool:
        return "fsdp" in (self.generator, self.fake) or self.teacher != "replicated"
