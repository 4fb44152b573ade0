"""The moving average of the student's weights, with a half-life in samples, not steps.

A half-life in samples means the same when the batch size changes from stage to stage.
"""

from collections.abc import Mapping

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

Tensors = dict[str, torch.Tensor]


class Ema:
    """Starts at `weights` (name → float32 tensor); after n samples a weight counts 2^(−n/h)."""

    def __init__(self, weights: Mapping[str, torch.Tensor], halflife_samples: float) -> None:
        self.halflife_samples = halflife_samples
        self.average: Tensors = {name: w.detach().clone() for name, w in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, torch.Tensor], samples: int) -> None:
        """Take the weights after an update that saw `samples` samples."""
        decay = 0.5 ** (samples / self.halflife_samples)
        current = [weights[name].detach() for name in self.average]
        get_ema_multi_avg_fn(decay)(list(self.average.values()), current, None)

    def load(self, average: Mapping[str, torch.Tensor]) -> None:
        if average.keys() != self.average.keys():
            raise ValueError(
                f"the stored average has {len(average)} weights, this student {len(self.average)}"
            )
        for name, target in self.average.items():
            target.copy_(average[name])
