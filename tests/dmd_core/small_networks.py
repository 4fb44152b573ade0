"""A convolutional network of a few hundred weights, and the random numbers of one update."""

import torch
from torch import nn

from dmd_core.condition import Condition
from dmd_core.fake_score import DiscriminatorHead, FakeScoreNetwork
from dmd_core.train_step import Pictures, StepNoise

CHANNELS, SIZE = 2, 4
SHAPE = (CHANNELS, SIZE, SIZE)


class SmallNetwork(nn.Module):
    """A raw network. `calls` keeps the (input, time, condition) of each call, `recorded` whether
    autograd recorded it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, CHANNELS)
        self.middle = nn.Conv2d(CHANNELS, 4, 3, padding=1)
        self.last = nn.Conv2d(4, CHANNELS, 3, padding=1)
        self.calls: list[tuple[torch.Tensor, torch.Tensor, Condition]] = []
        self.recorded: list[bool] = []

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        self.calls.append((x, time, cond))
        self.recorded.append(torch.is_grad_enabled())
        told = self.embed(cond.labels) + (time / 1000).sin()[:, None].to(x.dtype)
        return self.last(torch.tanh(self.middle(x + told[:, :, None, None])))


def judging_network(seed: int) -> FakeScoreNetwork:
    """A `SmallNetwork` with a discriminator's head on its middle."""
    network = SmallNetwork(seed)
    return FakeScoreNetwork(network, network.middle, DiscriminatorHead(4, SIZE, norm_groups=2))


def normal(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def uniform(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def labels(count: int, seed: int) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    return Condition(labels=torch.randint(11, (count,), generator=generator))


def step_noise(count: int, *, paired: int = 0, steps: int = 1) -> StepNoise:
    """For `count` samples and `paired` stored pairs that feed the distribution matching too."""
    total = count + paired
    return StepNoise(
        z=tuple(normal(count, 100 + k) for k in range(steps)),
        eps_dm=normal(total, 1),
        u_dm=uniform(total, 2),
        eps_fake=normal(total, 3),
        u_fake=uniform(total, 4),
        eps_gan=normal(count, 5),
        u_gan=uniform(count, 6),
    )


def pictures(count: int, *, r1: bool = True) -> Pictures:
    return Pictures(
        x=normal(count, 10),
        cond=labels(count, 11),
        eps=normal(count, 12),
        u=uniform(count, 13),
        eps_x=normal(count, 14),
        u_x=uniform(count, 15),
        eps_r1=normal(count, 16) if r1 else None,
    )


def gradients(loss: torch.Tensor, network: nn.Module) -> list[torch.Tensor]:
    """d loss / d weights, without storing it; weights that the loss does not reach give zero."""
    weights = list(network.parameters())
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
