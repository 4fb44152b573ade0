"""The networks of a run — G, F, the discriminator's head, the moving average — with their state.

One `DmdNetworks` per worker; `trainer.py` trains them.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dmd_core.checkpoint import CheckpointError, Tensors, pack_optimizer, unpack_optimizer
from dmd_core.denoiser import DiffusersNetwork, NetworkDenoiser
from dmd_core.ema import Ema
from dmd_core.fake_score import DiscriminatorHead, FakeScore, FakeScoreNetwork
from dmd_core.lora import LoraSettings, add_lora
from dmd_core.noise import stable_seed
from dmd_core.precision import PrecisionPolicy
from dmd_core.student import Student
from dmd_core.teacher import Teacher


@dataclass(frozen=True)
class World:
    """This worker among all: gradients are averaged over `size` workers."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class TrainerSettings:
    """What is fixed for a whole run. `timesteps` None: one step at T − 1."""

    seed: int = 0
    timesteps: tuple[int, ...] | None = None
    precision: PrecisionPolicy = field(default_factory=PrecisionPolicy)
    lora: LoraSettings | None = None
    discriminator: bool = False
    ema_halflife_samples: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    max_grad_norm: float = 10.0
    max_nonfinite_updates: int = 10


class DmdNetworks:
    """G and F start as the teacher. `student_trained` and `fake_trained` synchronise gradients
    over workers; `fake_frozen` is the same F outside DDP, for use without gradients.
    `latent_shape` (C,h,w) of the samples, where it is not the teacher's own."""

    def __init__(
        self,
        teacher: Teacher,
        settings: TrainerSettings,
        world: World,
        latent_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.settings, self.world, self.teacher = settings, world, teacher
        schedule, compute = teacher.schedule, settings.precision.compute
        unet = teacher.pipeline.unet
        self.timesteps = settings.timesteps or (schedule.num_timesteps - 1,)

        self.generator = copy.deepcopy(unet).train().requires_grad_(True)
        if settings.lora is not None:
            add_lora(self.generator, settings.lora, stable_seed(settings.seed, "lora"))
        self.student_trained = self._student_of(self._parallel(DiffusersNetwork(self.generator)))

        self.fake = copy.deepcopy(unet).train().requires_grad_(True)
        shape = latent_shape or teacher.latent_shape()
        self.head = self._make_head(min(shape[1:])) if settings.discriminator else None
        fake = FakeScoreNetwork(DiffusersNetwork(self.fake), self.fake.mid_block, self.head)
        fake.to(world.device)
        self.fake_trained = FakeScore(
            self._parallel(fake, unused=self.head is not None), schedule, compute
        )
        self.fake_frozen = FakeScore(fake, schedule, compute)

        self.optimizers = {name: self._adamw(p) for name, p in self.parameters().items()}
        halflife = settings.ema_halflife_samples
        self.ema = Ema(self.weights, halflife) if halflife else None

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What each optimizer trains."""
        parameters = {
            "generator": list(self.weights.values()),
            "fake": list(self.fake.parameters()),
        }
        if self.head is not None:
            parameters["head"] = list(self.head.parameters())
        return parameters

    # ------------------------------------------------------------------ the student, to look at

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The generator's trained weights by name: all of them, or the adapters alone."""
        return {n: p for n, p in self.generator.named_parameters() if p.requires_grad}

    def student(self, *, averaged: bool = True) -> Student:
        """The student outside DDP, so that one worker may sample alone; with the averaged weights
        where there are any (a copy)."""
        network = self.generator
        if averaged and self.ema is not None:
            network = copy.deepcopy(network)
            network.load_state_dict(self.ema.average, strict=False)
        return self._student_of(DiffusersNetwork(network))

    def _student_of(self, network: nn.Module) -> Student:
        compute = self.settings.precision.compute
        return Student(NetworkDenoiser(network, self.teacher.schedule, compute), self.timesteps)

    # ------------------------------------------------------------------ state

    def parts(self) -> dict[str, Tensors]:
        """All tensors of the state, by part; the inverse of `load`."""
        parts: dict[str, Tensors] = {
            "generator": {name: p.detach() for name, p in self.weights.items()},
            "fake": dict(self.fake.state_dict()),
        }
        if self.head is not None:
            parts["head"] = dict(self.head.state_dict())
        if self.ema is not None:
            parts["ema"] = self.ema.average
        for name, optimizer in self.optimizers.items():
            packed = pack_optimizer(optimizer)
            if packed:  # a head that no stage has trained yet has none
                parts[f"{name}_optimizer"] = packed
        return parts

    def load(self, parts: Mapping[str, Tensors]) -> None:
        stored, ours = set(parts), set(self.parts()) | {f"{n}_optimizer" for n in self.optimizers}
        needed = ours - {"head_optimizer"}  # no stage may have trained the head yet
        if not needed <= stored <= ours:
            raise CheckpointError(
                f"the checkpoint holds {', '.join(sorted(stored))}; expected "
                f"{', '.join(sorted(ours))} (was the run started with other settings?)"
            )
        weights = self.weights
        if parts["generator"].keys() != weights.keys():
            raise CheckpointError("the checkpoint's generator has other weights than this student")
        with torch.no_grad():
            for name, value in parts["generator"].items():
                weights[name].copy_(value)
        self.fake.load_state_dict(parts["fake"])
        if self.head is not None:
            self.head.load_state_dict(parts["head"])
        if self.ema is not None:
            self.ema.load(parts["ema"])
        for name, optimizer in self.optimizers.items():
            unpack_optimizer(optimizer, parts.get(f"{name}_optimizer", {}))

    # ------------------------------------------------------------------ building

    def _make_head(self, side: int) -> DiscriminatorHead:
        """For samples whose shorter side is `side`: every level but the last halves it."""
        channels = self.fake.config.block_out_channels
        size = math.ceil(side / 2 ** (len(channels) - 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(self.settings.seed, "head"))
            return DiscriminatorHead(channels[-1], size)

    def _adamw(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        settings = self.settings
        return torch.optim.AdamW(
            parameters, lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay
        )

    def _parallel(self, network: nn.Module, *, unused: bool = False) -> nn.Module:
        if self.world.size == 1:
            return network
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices, find_unused_parameters=unused)
