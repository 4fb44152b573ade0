"""Values that cross module borders."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PairBatch:
    """Noise–latent pairs on the CPU: row i is the teacher's `latents[i]` from `noise[i]`.

    `noise` and `latents` are (B,C,h,w) in the dtype they are stored in; `pair_ids` and `prompts`
    have B entries.
    """

    pair_ids: tuple[int, ...]
    prompts: tuple[str, ...]
    noise: torch.Tensor
    latents: torch.Tensor

    def __len__(self) -> int:
        return len(self.pair_ids)
