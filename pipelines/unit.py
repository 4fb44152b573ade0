"""Station 9: what the confidence intervals of an evaluation are over."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmd_core.families import family_of
from pipelines.beside_settings import FEWEST

PROMPTS, PICTURES = "prompts", "pictures"


@dataclass(frozen=True)
class Unit:
    """Prompts are a sample of all that could be asked for, and the pictures of one prompt are
    alike: they count once. The classes of a class-conditional teacher are all there are, so its
    pictures are the sample."""

    confidence: float
    name: str = PROMPTS

    @staticmethod
    def of_teacher(folder: str, confidence: float) -> "Unit":
        return Unit(confidence, PICTURES if family_of(folder).on_pixels else PROMPTS)

    def too_few(self, prompts: Sequence[str]) -> str:
        """Why no interval can be given for rows of these prompts; "": one can."""
        found = len(prompts) if self.name == PICTURES else len(set(prompts))
        if found >= FEWEST:
            return ""
        distinct = "" if self.name == PICTURES else "distinct "
        return (
            f"evaluate.prompts gives {found} {distinct}{self.name}; expected at least {FEWEST}, "
            f"for {self.name} are what the confidence intervals are over"
        )

    def of(self, prompts: Sequence[str]) -> dict[str, Any]:
        """For the metrics: the confidence, and which rows of `prompts` belong together."""
        units = None if self.name == PICTURES else np.unique(prompts, return_inverse=True)[1]
        return {"confidence": self.confidence, "units": units}
