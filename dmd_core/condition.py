"""What a network is told beside x_t and t: text, class label, SDXL's extra inputs.

One value for every teacher family, so that guidance, batching and the losses need not know which
of the fields a family uses.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class Condition:
    """Every tensor has one row per sample, or is absent.

    `text` (B,L,D) token embeddings and their `mask` (B,L), 1 = attend (PixArt); `pooled` (B,P) the
    pooled text embedding (SDXL, SD 3, FLUX); `time_ids` (B,6) SDXL's size and crop; `guidance`
    (B,) the scale that a guidance-distilled network takes as an input (FLUX); `labels` (B,) int64
    classes. All absent: an unconditional network.
    """

    text: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    guidance: torch.Tensor | None = None

    @staticmethod
    def cat(*parts: "Condition") -> "Condition":
        """The rows of all parts, one after the other; every part must have the same fields."""
        joined = {}
        for field in fields(Condition):
            tensors = [getattr(part, field.name) for part in parts]
            if all(tensor is None for tensor in tensors):
                continue
            if any(tensor is None for tensor in tensors):
                raise ValueError(f"conditions differ: {field.name} is given in some and not in all")
            joined[field.name] = torch.cat(tensors)
        return Condition(**joined)

    def rows(self, index: slice | torch.Tensor) -> "Condition":
        return self._map(lambda tensor: tensor[index])

    def expand(self, count: int) -> "Condition":
        """A condition of one row, repeated `count` times."""
        return self._map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def with_guidance(self, scale: float) -> "Condition":
        """The same for another scale; only where the network takes one."""
        assert self.guidance is not None
        return replace(self, guidance=torch.full_like(self.guidance, scale))

    def to(self, device: torch.device | str) -> "Condition":
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Condition":
        tensors = ((field.name, getattr(self, field.name)) for field in fields(self))
        return Condition(**{name: change(value) for name, value in tensors if value is not None})
