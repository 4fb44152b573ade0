"""Two pipelines on one device, one at a time: a large teacher and its student, both in float32, do
not fit a GPU together."""

from typing import Any

import torch
from torch import nn


class DeviceTurns:
    """Whose networks are on `device`: those of `at_work` when this is made. The other pipelines'
    wait in host memory, but for `stays`, which several use. On a CPU nothing is ever moved."""

    def __init__(
        self, device: str | torch.device, at_work: Any, stays: nn.Module | None = None
    ) -> None:
        self._device, self._at_work, self._stays = torch.device(device), at_work, stays

    def bring(self, pipeline: Any) -> bool:
        """Move the pipeline's networks to the device and those that are there away. False: nothing
        was to be moved."""
        if self._device.type == "cpu" or pipeline is self._at_work:
            return False
        self._move(self._at_work, torch.device("cpu"))  # before the others need the room
        self._move(pipeline, self._device)
        self._at_work = pipeline
        return True

    def _move(self, pipeline: Any, device: torch.device) -> None:
        for part in pipeline.components.values():
            if isinstance(part, nn.Module) and part is not self._stays:
                part.to(device)
