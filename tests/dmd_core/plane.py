"""Students in the plane: small networks, several at once, trained by `dmd_core`'s public steps.

One batch of networks stands for one network under several seeds: every parameter has a leading
seed axis, and row i of any batch belongs to network i mod S, which stays true when batches of a
multiple of S rows are concatenated. Losses are per sample, so networks do not see each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from dmd_core.condition import Condition
from dmd_core.denoiser import NetworkDenoiser
from dmd_core.fake_score import FakeScore, FakeScoreNetwork
from dmd_core.schedule import Schedule
from dmd_core.step_types import LossSettings, PairedPart, Pictures, StepNoise
from dmd_core.student import Student
from dmd_core.train_step import draw_times, fake_score_step, generator_step
from tests.dmd_core.mixture import MixtureDenoiser, exact_samples, ode_endpoints

# σ on EDM's grid, as in the paper's ablations (CIFAR-10, ImageNet-64); the ring's σ_data.
SCHEDULE = Schedule.edm(sigma_data=0.71)
REAL = MixtureDenoiser(SCHEDULE)
COND = Condition()
PRETRAINING_RATE = 1e-2


class Linears(nn.Module):
    """S linear layers on interleaved rows: (S·b, inputs) → (S·b, outputs)."""

    def __init__(self, inputs: int, outputs: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        bound = inputs**-0.5
        drawn = [(2 * torch.rand(inputs + 1, outputs, generator=g) - 1) * bound for g in generators]
        self.weight = nn.Parameter(torch.stack([w[:-1] for w in drawn]))  # (S, inputs, outputs)
        self.bias = nn.Parameter(torch.stack([w[-1:] for w in drawn]))  # (S, 1, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        per_seed = x.view(-1, len(self.weight), x.shape[1]).transpose(0, 1)
        out = torch.baddbmm(self.bias, per_seed, self.weight)
        return out.transpose(0, 1).reshape(len(x), -1)


class Networks(nn.Module):
    """S MLPs (x, time) → output, all (S·b,2,1,1) but time (S·b,)."""

    def __init__(self, width: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.time_frequencies = 2.0 ** torch.arange(-1, 5)
        self.frequencies = torch.tensor([2.0, 4.0, 8.0])
        inputs = 2 + 4 * len(self.frequencies) + 2 * len(self.time_frequencies)
        self.entry = Linears(inputs, width, generators)
        self.middle = nn.Sequential(Linears(width, width, generators), nn.SiLU())
        self.exit = nn.Sequential(
            Linears(width, width, generators), nn.SiLU(), Linears(width, 2, generators)
        )

    def forward(self, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        angles = (x.flatten(1)[:, :, None] * self.frequencies).flatten(1)
        angles = torch.cat([angles, time.to(x.dtype)[:, None] * self.time_frequencies], dim=1)
        features = torch.cat([x.flatten(1), angles.cos(), angles.sin()], dim=1)
        return self.exit(self.middle(F.silu(self.entry(features)))).view_as(x)


class Heads(nn.Module):
    """S discriminator heads: middle features (S·b, width) → logits (S·b,)."""

    def __init__(self, width: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Linears(width, width, generators), nn.SiLU(), Linears(width, 1, generators)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features).flatten()


class Draws:
    """Random numbers of each seed from its own generator, interleaved: what a seed gets does not
    depend on which others are trained beside it."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def normal(self, rows: int) -> torch.Tensor:
        """(S·rows,2,1,1)"""
        return self._interleaved([torch.randn(rows, 2, generator=g) for g in self.generators])

    def exact(self, rows: int) -> torch.Tensor:
        """Exact samples of the mixture: (S·rows,2,1,1)."""
        return self._interleaved([exact_samples(rows, g) for g in self.generators])

    def uniform(self, rows: int) -> torch.Tensor:
        """(S·rows,) float64 in [0, 1)."""
        drawn = [torch.rand(rows, generator=g, dtype=torch.float64) for g in self.generators]
        return torch.stack(drawn, dim=1).flatten()

    def index(self, rows: int, high: int) -> torch.Tensor:
        """(S·rows,) int64 in [0, high)."""
        return (self.uniform(rows) * high).long()

    def step_noise(self, rows: int, steps: int) -> StepNoise:
        return StepNoise(
            z=tuple(self.normal(rows) for _ in range(steps)),
            eps_dm=self.normal(rows), u_dm=self.uniform(rows),
            eps_fake=self.normal(rows), u_fake=self.uniform(rows),
            eps_gan=self.normal(rows), u_gan=self.uniform(rows),
        )  # fmt: skip

    def pictures(self, rows: int) -> Pictures:
        return Pictures(
            self.exact(rows), COND, self.normal(rows), self.uniform(rows),
            self.normal(rows), self.uniform(rows),
        )  # fmt: skip

    @staticmethod
    def _interleaved(points: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(points, dim=1).view(-1, 2, 1, 1)


@dataclass(frozen=True)
class Budget:
    """What every variant may spend: `rows` samples per seed and update, `updates` of the student.

    Optimiser of all networks: AdamW, weight decay 0.01, β (0.9, 0.999) as in the paper; rates fall
    linearly to 0, for a run this short has no time to average over its last updates.
    """

    width: int = 64
    rows: int = 128
    pretraining: int = 600
    updates: int = 1500
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class Variant:
    """What is trained: `settings.reg` > 0 uses `pairs` exact pairs, `settings.gan` > 0 exact
    samples as real data. `gan_fake`: the discriminator's weight beside the fake score's loss."""

    settings: LossSettings
    pairs: int = 0
    fake_updates: int = 1
    timesteps: tuple[int, ...] = (999,)
    gan_fake: float = 0.01


@cache
def pretrained(budget: Budget, seeds: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Weights of `Networks` fitted to the exact denoiser: what student and fake start from."""
    draws = Draws(seeds)
    networks = Networks(budget.width, draws.generators)
    denoiser, optimizer = NetworkDenoiser(networks, SCHEDULE), _optimizer(networks)
    for update in range(budget.pretraining):
        _set_rate(optimizer, PRETRAINING_RATE * (1 - update / budget.pretraining))
        t = draw_times(draws.uniform(budget.rows), SCHEDULE)
        x_t = SCHEDULE.diffuse(draws.exact(budget.rows), draws.normal(budget.rows), t)
        error = (denoiser(x_t, t, COND) - REAL(x_t, t, COND)).square().flatten(1).mean(dim=1)
        _descend(optimizer, SCHEDULE.score_weight(t).float() * error, len(seeds))
    return {name: value.clone() for name, value in networks.state_dict().items()}


@cache
def ode_pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ε, y), each (count,2,1,1): the same set for every seed, as a teacher has one."""
    eps = torch.randn(count, 2, generator=torch.Generator().manual_seed(12345))
    return eps.view(-1, 2, 1, 1), ode_endpoints(eps, SCHEDULE).view(-1, 2, 1, 1)


def distil(variant: Variant, budget: Budget, seeds: tuple[int, ...]) -> Student:
    """Algorithm 1 of DMD (or DMD2's) on the mixture, one student per seed."""
    draws = Draws(seeds)
    networks, fake_networks = (Networks(budget.width, draws.generators) for _ in range(2))
    for initialised in (networks, fake_networks):
        initialised.load_state_dict(pretrained(budget, seeds))
    student = Student(NetworkDenoiser(networks, SCHEDULE), variant.timesteps)
    heads = Heads(budget.width, draws.generators)
    judging = FakeScoreNetwork(fake_networks, fake_networks.middle, heads)
    fake = FakeScore(judging, SCHEDULE)
    optimizer, fake_optimizer = _optimizer(networks), _optimizer(judging)
    which_step = torch.Generator().manual_seed(0)

    for update in range(budget.updates):
        for each in (optimizer, fake_optimizer):
            _set_rate(each, budget.learning_rate * (1 - update / budget.updates))
        for fake_update in range(variant.fake_updates):
            step = int(torch.randint(len(variant.timesteps), (), generator=which_step))
            noise = draws.step_noise(budget.rows, len(variant.timesteps))
            if fake_update == 0:
                losses, x = _student_losses(variant, budget, student, fake, noise, draws, step)
                _descend(optimizer, losses, len(seeds))
            else:
                with torch.no_grad():
                    x = student.predict(student.rollout(noise.z, COND, step), step, COND)
            losses = _fake_losses(variant, budget, fake, x, noise, draws)
            _descend(fake_optimizer, losses, len(seeds))
    return student


def _student_losses(
    variant: Variant,
    budget: Budget,
    student: Student,
    fake: FakeScore,
    noise: StepNoise,
    draws: Draws,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted losses (S·b,), and the student's samples (S·b,2,1,1)."""
    settings, paired = variant.settings, None
    if settings.reg > 0:
        index = draws.index(budget.rows, variant.pairs)
        eps, y = ode_pairs(variant.pairs)
        paired = PairedPart(eps[index], y[index], COND)
    result = generator_step(
        student, REAL, fake, noise, COND, paired, settings, step=step, discriminator=fake.judge
    )
    losses = (
        (settings.dm, result.loss_dm),
        (settings.reg, result.loss_reg),
        (settings.gan, result.loss_gan),
    )
    return torch.stack([w * loss for w, loss in losses if len(loss)]).sum(dim=0), result.x


def _fake_losses(
    variant: Variant,
    budget: Budget,
    fake: FakeScore,
    x: torch.Tensor,
    noise: StepNoise,
    draws: Draws,
) -> torch.Tensor:
    """(S·b,)"""
    pictures = draws.pictures(budget.rows) if variant.settings.gan > 0 else None
    fitted = fake_score_step(fake, x, noise, COND, variant.settings, pictures=pictures)
    if pictures is None:
        return fitted.loss_score
    return fitted.loss_score + variant.gan_fake * fitted.loss_gan


def student_samples(student: Student, count: int, seeds: tuple[int, ...]) -> torch.Tensor:
    """`count` samples of each seed's student, from noise none was trained on: (S,count,2)."""
    draws = Draws([10_000 + seed for seed in seeds])
    noises = [draws.normal(count) for _ in student.timesteps]
    return student.sample(noises, COND).view(count, len(seeds), 2).transpose(0, 1)


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), weight_decay=0.01, fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _descend(optimizer: torch.optim.Optimizer, losses: torch.Tensor, seeds: int) -> None:
    """One update on per-sample losses (S·b,): each network gets the gradient of its own mean."""
    optimizer.zero_grad(set_to_none=True)
    (losses.mean() * seeds).backward()
    optimizer.step()
