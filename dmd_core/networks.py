"""The networks of a run — G, F, the discriminator's head, the moving average — with their state.

One `DmdNetworks` per worker; `trainer.py` trains them.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dmd_core.checkpoint import CheckpointError, Tensors, pack_optimizer
from dmd_core.denoiser import NetworkDenoiser
from dmd_core.diffusers_networks import DiffusersNetwork, Middle, middle_of
from dmd_core.ema import Ema
from dmd_core.fake_score import DiscriminatorHead, FakeScore, FakeScoreNetwork
from dmd_core.lora import LoraSettings, adapter_start, add_lora
from dmd_core.noise import stable_seed
from dmd_core.parallel import Parallel, World, fill, on_meta, replicate, shard
from dmd_core.precision import PrecisionPolicy, hold
from dmd_core.student import Student
from dmd_core.teacher import Teacher


@dataclass(frozen=True)
class TrainerSettings:
    """What is fixed for a whole run. `timesteps` None: one step at T − 1."""

    seed: int = 0
    timesteps: tuple[int, ...] | None = None
    parallel: Parallel = field(default_factory=Parallel)
    precision: PrecisionPolicy = field(default_factory=PrecisionPolicy)
    lora: LoraSettings | None = None
    discriminator: bool = False
    ema_halflife_samples: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    max_grad_norm: float = 10.0
    max_nonfinite_updates: int = 10


class DmdNetworks:
    """G and F start as the teacher, whose own network is then held in the dtype of the passes
    (`precision.hold`). `student_trained` and `fake_trained` synchronise gradients over workers;
    `student` and `fake_frozen` are the same networks outside DDP. `latent_shape` (C,h,w) of the
    samples, where it is not the teacher's own.

    With a sharded network every call of it, and of `parts` and `averaged`, is one of all workers.
    """

    def __init__(
        self,
        teacher: Teacher,
        settings: TrainerSettings,
        world: World,
        latent_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.settings, self.world, self.teacher = settings, world, teacher
        schedule, compute = teacher.schedule, settings.precision.compute
        self.timesteps = settings.timesteps or (schedule.num_timesteps - 1,)
        shape = latent_shape or teacher.latent_shape()

        self.generator = self._copy_of_teacher(settings.parallel.generator, settings.lora)
        student = DiffusersNetwork(self.generator)
        self.fake = self._copy_of_teacher(settings.parallel.fake)
        middle = middle_of(self.fake, min(shape[1:])) if settings.discriminator else None
        self.head = self._make_head(middle) if middle else None
        fake = self._fake_network(middle)
        self.trained = {
            "generator": self._placed(student, settings.parallel.generator),
            "fake": self._placed(fake, settings.parallel.fake, unused=self.head is not None),
        }
        self._place_teacher()
        self.student_trained = self._student_of(self.trained["generator"])
        self.student = self._student_of(student)
        self.fake_trained = FakeScore(self.trained["fake"], schedule, compute)
        self.fake_frozen = FakeScore(fake, schedule, compute)

        self.optimizers = {
            name: self._adamw(list(named.values())) for name, named in self._named().items()
        }
        halflife = settings.ema_halflife_samples
        self.ema = Ema(self.weights, halflife) if halflife else None

    @property
    def sharded(self) -> bool:
        """Must all workers call the student together?"""
        parallel = self.settings.parallel
        return parallel.generator == "fsdp" or parallel.teacher != "replicated"

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What each optimizer trains."""
        return {name: list(named.values()) for name, named in self._named().items()}

    def _named(self) -> dict[str, dict[str, nn.Parameter]]:
        named = {"generator": self.weights, "fake": dict(self.fake.named_parameters())}
        if self.head is not None:
            named["head"] = dict(self.head.named_parameters())
        return named

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The generator's trained weights by name: all of them, or the adapters alone."""
        return {n: p for n, p in self.generator.named_parameters() if p.requires_grad}

    @contextmanager
    def averaged(self) -> Iterator[Student]:
        """The student as it would be exported, until the block ends: with the averaged weights,
        where there are any."""
        if self.ema is None:
            yield self.student
            return
        weights = self.weights
        trained = {name: weight.detach().clone() for name, weight in weights.items()}
        _copy(self.ema.average, weights)
        try:
            yield self.student
        finally:
            _copy(trained, weights)

    # ------------------------------------------------------------------ state

    def parts(self) -> dict[str, Tensors]:
        """All tensors of the state, by part, not copied; sharded ones as they are."""
        parts = self._weights_by_part()
        for name, named in self._named().items():
            parts[f"{name}_optimizer"] = pack_optimizer(self.optimizers[name], list(named))
        return parts

    def targets(self, stored: Mapping[str, Mapping[str, torch.Size]]) -> dict[str, Tensors]:
        """What a checkpoint that holds `stored` is read into: the live state itself, for a second
        one might not fit. Raises `CheckpointError` if it is not of such networks."""
        ours = self.parts()
        if stored.keys() != ours.keys():
            raise CheckpointError(
                f"the checkpoint holds {', '.join(sorted(stored))}; expected "
                f"{', '.join(sorted(ours))} (was the run started with other settings?)"
            )
        for part, tensors in ours.items():
            sizes = {name: tensor.shape for name, tensor in tensors.items()}
            odd = sorted(name for name, _ in sizes.items() ^ stored[part].items())
            if odd:
                raise CheckpointError(
                    f"the checkpoint's {part} has other weights than this run's: {odd[0]}"
                )
        return ours

    def load(self, parts: Mapping[str, Tensors]) -> None:
        """Take the state of equal networks from a copy of their `parts`."""
        for part, tensors in self.parts().items():
            _copy(parts[part], tensors)

    def _weights_by_part(self) -> dict[str, Tensors]:
        parts: dict[str, Tensors] = {
            "generator": {name: p.detach() for name, p in self.weights.items()},
            "fake": dict(self.fake.state_dict()),
        }
        if self.head is not None:
            parts["head"] = dict(self.head.state_dict())
        if self.ema is not None:
            parts["ema"] = self.ema.average
        return parts

    # ------------------------------------------------------------------ building

    def _copy_of_teacher(self, strategy: str, lora: LoraSettings | None = None) -> Any:
        """A network to train, with the teacher's weights; one to be sharded has no memory yet."""
        model = self.teacher.model
        network: Any = on_meta(model) if strategy == "fsdp" else copy.deepcopy(model)
        network.requires_grad_(True)
        if lora is not None:
            add_lora(network, lora, self._lora_seed)
            hold(network, self.settings.precision.compute)  # all but the adapters is frozen
        # Without the dropout the teacher was trained with: the student and both scores are those of
        # the networks that sample, and no update depends on random numbers of no seed of ours.
        network.eval()
        if self.settings.parallel.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return network

    def _placed(self, network: nn.Module, strategy: str, *, unused: bool = False) -> nn.Module:
        if strategy == "ddp":
            return replicate(network.to(self.world.device), self.world, unused=unused)
        start = self._start_of(network)
        shard(network, self.world)
        fill(network, self.world.device, start.__getitem__)
        return network

    def _start_of(self, network: nn.Module) -> Tensors:
        """The weights a network from the meta device starts with, by their names in it."""
        model = self.teacher.model
        ours = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        head = {} if self.head is None else self.head.state_dict()
        start: Tensors = {}
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if name.startswith("head."):
                start[name] = head[name.removeprefix("head.")]
                continue
            own = name.removeprefix("network.").removeprefix("model.")
            teachers = own.replace(".base_layer.", ".")
            start[name] = (
                ours[teachers].detach()
                if teachers in ours
                else adapter_start(own, tuple(tensor.shape), self._lora_seed)
            )
        return start

    def _place_teacher(self) -> None:
        placement, model = self.settings.parallel.teacher, self.teacher.model
        compute = self.settings.precision.compute
        hold(model, compute)  # the copies of it, which may be trained, are made
        if placement == "replicated":
            model.to(self.world.device)
        else:
            shard(model, self.world, offload=placement == "offload", compute=compute)

    @property
    def _lora_seed(self) -> int:
        return stable_seed(self.settings.seed, "lora")

    def _make_head(self, middle: Middle) -> DiscriminatorHead:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(self.settings.seed, "head"))
            return DiscriminatorHead(middle.channels, middle.size)

    def _fake_network(self, middle: Middle | None) -> FakeScoreNetwork:
        network = DiffusersNetwork(self.fake)
        if middle is None:
            return FakeScoreNetwork(network)
        return FakeScoreNetwork(
            network, middle.block, self.head, after=middle.after, patch=middle.patch
        )

    def _adamw(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        """With its state as of step 0, so that every checkpoint holds every optimizer."""
        settings = self.settings
        optimizer = torch.optim.AdamW(
            parameters, lr=0.0, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        for parameter in parameters:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer

    def _student_of(self, network: nn.Module) -> Student:
        compute = self.settings.precision.compute
        return Student(NetworkDenoiser(network, self.teacher.schedule, compute), self.timesteps)


@torch.no_grad()
def _copy(source: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor]) -> None:
    for name, target in into.items():
        target.copy_(source[name])
