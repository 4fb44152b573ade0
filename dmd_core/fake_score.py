"""The fake score F and, for DMD2, the discriminator that reads its middle (DMD2 §4.3).

Score and logits of one update come out of one forward pass of one module, so that DDP sees one
forward and synchronises once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dmd_core.condition import Condition
from dmd_core.denoiser import NetworkDenoiser
from dmd_core.diffusers_networks import feature_map
from dmd_core.schedule import Schedule

# (x_t, t, cond) of some samples
Inputs = tuple[torch.Tensor, torch.Tensor, Condition]


class DiscriminatorHead(nn.Module):
    """Middle features (B,C,H,W) → logits (B,): 4×4 convolutions of stride 2 down to at most 4×4
    pixels, then one that covers what is left (the head of DMD2, GroupNorm and SiLU between)."""

    def __init__(self, channels: int, size: int, *, norm_groups: int = 32) -> None:
        super().__init__()
        # At 1×1 a group of few channels is normalised to a constant: at least 8 in each.
        fitting = (n for n in range(norm_groups, 1, -1) if channels % n == 0 and channels // n >= 8)
        groups = next(fitting, 1)
        layers: list[nn.Module] = []
        while size > 4:
            layers += [
                nn.Conv2d(channels, channels, kernel_size=4, stride=2, padding=1),
                nn.GroupNorm(groups, channels),
                nn.SiLU(),
            ]
            size = size // 2
        layers += [
            nn.Conv2d(channels, channels, kernel_size=size),
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, 1, kernel_size=1),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        # Out of any autocast: a difference of logits (R1) is lost in bfloat16.
        with torch.autocast(features.device.type, enabled=False):
            return self.layers(features.float()).mean(dim=(1, 2, 3))


class FakeScoreNetwork(nn.Module):
    """A raw network and a head on the output of one of its blocks, `middle`.

    Called with `judged` = n, the last n rows are judged (logits (n,)) and only the rows before
    them give a score (raw output (B−n,…)): behind `middle`, in the blocks `after`, only these are
    computed. A judge reads the encoder, which is less than half of a UNet. Where `middle` gives
    tokens, each stands for `patch` × `patch` of the sample.
    """

    def __init__(
        self,
        network: nn.Module,
        middle: nn.Module | None = None,
        head: nn.Module | None = None,
        after: Iterable[nn.Module] = (),
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.network, self.head, self._patch = network, head, patch
        self._features: torch.Tensor | None = None
        self._rows: slice = slice(None)  # those that give a score
        if head is not None:
            if middle is None:
                raise ValueError("a head needs the block whose output it reads (middle)")
            middle.register_forward_hook(self._keep)
            for block in after:
                block.register_forward_pre_hook(self._narrow, with_kwargs=True)

    def _keep(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        # Blocks of text and picture give both, the picture last.
        self._features = output[-1] if isinstance(output, tuple) else output

    def _narrow(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Of all that a block behind the middle is given: sample, skips, time, text."""

        def cut(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value[self._rows]
            return tuple(map(cut, value)) if isinstance(value, tuple) else value

        return cut(args), {name: cut(value) for name, value in kwargs.items()}

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, cond: Condition, judged: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if judged and self.head is None:
            raise ValueError("this fake score has no discriminator head")
        kept = len(x) - judged
        self._rows = slice(max(kept, 1))  # attention takes no empty batch
        output = self.network(x, time, cond)
        features, self._features = self._features, None
        if self.head is None or features is None or judged == 0:
            return output, output.new_zeros(0)
        judged_features = feature_map(features[kept:], x, self._patch)
        return output[:kept], self.head(judged_features)


@dataclass(frozen=True)
class FakeScore:
    """F as a denoiser, with its discriminator: `network` is a `FakeScoreNetwork`, or DDP's."""

    network: nn.Module
    schedule: Schedule
    compute_dtype: torch.dtype = torch.float32

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """x̂_fake (B,C,h,w), float32."""
        return NetworkDenoiser(
            lambda x, time, c: self.network(x, time, c)[0], self.schedule, self.compute_dtype
        )(x_t, t, cond)

    def judge(self, x_t: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Logits (B,) that x_t is a diffused real picture."""
        return self._run((x_t, t, cond), judged=len(x_t))[1]

    def score_and_judge(self, score: Inputs, judge: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """x̂_fake of the first inputs and logits of the second, in one forward pass."""
        x_t, t = (torch.cat([score[i], judge[i]]) for i in (0, 1))  # type: ignore[arg-type]
        both = (x_t, t, Condition.cat(score[2], judge[2]))
        output, logits = self._run(both, judged=len(judge[0]))
        return self.schedule.x0_from_output(output, score[0], score[1]), logits

    def _run(self, inputs: Inputs, *, judged: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits: list[torch.Tensor] = []

        def network(x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
            output, values = self.network(x, time, cond, judged)
            logits.append(values)
            return output

        output = NetworkDenoiser(network, self.schedule, self.compute_dtype).raw(*inputs)
        return output.float(), logits[0].float()
