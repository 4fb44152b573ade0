"""The `train_teacher.pixel` section: a class-conditional pixel teacher, trained as EDM does."""

from typing import Annotated

from pydantic import Field, model_validator

from pipelines.section import Section

_Positive = Annotated[int, Field(gt=0)]
_Index = Annotated[int, Field(ge=0)]


class PixelTrainSection(Section):
    """With `train_teacher.data: cifar10`. Defaults are EDM's for CIFAR-10 (its DDPM++)."""

    path: str = Field(
        default="data/cifar10", description="what `dmd data cifar10` wrote: a folder or s3:// URL"
    )
    channels: tuple[_Positive, ...] = Field(
        default=(256, 256, 256), description="one number for each halving of the size, and one"
    )
    layers_per_block: _Positive = 4
    attention_levels: tuple[_Index, ...] = Field(
        default=(1,), description="indices into channels; level 0 has the picture's size"
    )
    dropout: float = Field(default=0.13, ge=0, lt=1)
    class_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="above 0: a class 'none' is learned, for guidance"
    )
    p_mean: float = Field(default=-1.2, description="of ln σ")
    p_std: float = Field(default=1.2, gt=0, description="of ln σ")
    ema_halflife_samples: float = Field(default=500_000, gt=0)

    @model_validator(mode="after")
    def _levels_exist(self) -> "PixelTrainSection":
        wrong = [level for level in self.attention_levels if level >= len(self.channels)]
        if wrong:
            raise ValueError(
                f"attention_levels has {wrong[0]}; expected indices into channels, 0 to "
                f"{len(self.channels) - 1}"
            )
        return self
