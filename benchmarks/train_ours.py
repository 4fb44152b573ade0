"""Our side of `benchmarks.train`: `StepSource.draw`, then `DmdTrainer.step`, as a worker does."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import FrozenDict
from torch import nn

from benchmarks.train_networks import (
    GAN_WEIGHTS,
    GUIDANCE_SCALE,
    LEARNING_RATE,
    Case,
    Contestant,
    edm_network,
    prompts,
    real_pictures,
)
from dmd_core.condition import Condition
from dmd_core.denoiser import NetworkDenoiser
from dmd_core.diffusers_networks import DiffusersNetwork
from dmd_core.networks import DmdNetworks, World
from dmd_core.precision import PrecisionPolicy
from dmd_core.schedule import Schedule
from dmd_core.teacher import Teacher, load_teacher
from dmd_core.trainer import DmdTrainer
from pipelines.step_data import Progress, StepSource
from pipelines.streams import PictureStream
from pipelines.train_config import TrainSection
from pipelines.train_settings import stage_settings, trainer_settings


def ours(case: Case) -> Contestant:
    """The networks of `case` and one iteration of their training."""
    teacher = _edm_teacher(case) if case.path == "edm" else _sd_teacher(case)
    gan, gan_fake = GAN_WEIGHTS[case.path] if case.gan else (0.0, 0.0)
    section = TrainSection.model_validate(
        {
            "train_batch_size": case.batch_size,
            "regression_batch_size": 0,
            "lambda_reg": 0.0,
            "learning_rate": LEARNING_RATE,
            "guidance_scale": GUIDANCE_SCALE if case.path == "sd" else 1.0,
            "fake_updates": case.fake_updates,
            "gan_weight": gan,
            "gan_fake_weight": gan_fake,
            "real_pictures": "emoji" if case.gan else "",
            "mixed_precision": case.precision,
        }
        | ({"micro_batch_size": case.micro_batch_size} if case.micro_batch_size else {})
    )
    ((_, keys),) = section.plan()
    networks = DmdNetworks(
        teacher, trainer_settings(section, 0), World(device=case.device), case.shape
    )
    trainer = DmdTrainer(networks, teacher.encode_prompts(prompts(case)[:1]))
    trainer.enter_stage(stage_settings(section, keys, None))
    source = StepSource(
        teacher,
        seed=0,
        rank=0,
        world=1,
        shape=case.shape,
        timesteps=1,
        prompts=_Repeated(prompts(case)),
        pictures=cast(PictureStream, _Pictures(case)) if case.gan else None,
    )
    progress = Progress()

    def step() -> None:
        nonlocal progress
        trainer.step(source.draw(progress, keys, None))
        progress = progress.after_step(keys)

    modules = [teacher.model, networks.generator, networks.fake]
    return Contestant(step, modules + ([networks.head] if networks.head else []))


class _Repeated:
    """The same prompts again and again."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self._texts = texts

    def batch_from(self, position: int, global_batch: int, rank: int = 0, world_size: int = 1):
        return self._texts


class _Pictures:
    """The same latents and prompts again and again: reading them is no part of a step."""

    def __init__(self, case: Case) -> None:
        self._batch = real_pictures(case), prompts(case)

    def batch_from(self, position: int, global_batch: int, rank: int = 0, world_size: int = 1):
        return self._batch


# ------------------------------------------------------------------ teachers


def _sd_teacher(case: Case) -> Teacher:
    compute = PrecisionPolicy.named(case.precision).compute
    return load_teacher(case.folder, device=case.device, compute_dtype=compute, to_train=True)


def _edm_teacher(case: Case) -> Teacher:
    """Their EDM network in the place of a teacher's UNet."""
    unet: nn.Module = _EdmUnet(edm_network(case), case.edm)
    nn.Module.to(unet, case.device)  # diffusers' own asks for its registered configuration
    unet.requires_grad_(False)

    def encode(texts: Any) -> Condition:
        return Condition(labels=torch.tensor([int(text) for text in texts], device=case.device))

    schedule = Schedule.edm()
    teacher = SimpleNamespace(
        model=unet,
        schedule=schedule,
        device=case.device,
        encode_prompts=encode,
        latent_shape=lambda *_: case.shape,
        denoiser=lambda dtype: NetworkDenoiser(DiffusersNetwork(unet), schedule, dtype),
    )
    return cast(Teacher, teacher)


class _EdmUnet(UNet2DModel):
    """The network inside EDM's preconditioning, called as `DiffusersNetwork` calls a UNet."""

    def __init__(self, preconditioned: Any, settings: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        channels = [settings["model_channels"] * mult for mult in settings["channel_mult"]]
        self._internal_dict = FrozenDict(block_out_channels=channels)
        self.network, self.num_classes = preconditioned.model, settings["label_dim"]

    @property
    def mid_block(self) -> nn.Module:
        """Where their discriminator reads: the encoder's last block."""
        return list(self.network.enc.values())[-1]

    @property
    def up_blocks(self) -> list[nn.Module]:
        return list(self.network.dec.values())

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, time: torch.Tensor, class_labels: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor]:
        network, silu = self.network, nn.functional.silu
        labels = nn.functional.one_hot(class_labels, self.num_classes).to(x.dtype)
        embedded = network.map_layer1(silu(network.map_layer0(network.map_noise(time))))
        embedded = silu(embedded + network.map_label(labels))
        skips = []
        for name, block in network.enc.items():
            x = block(x) if name.endswith("_conv") else block(x, embedded)
            skips.append(x)
        for block in network.dec.values():
            if x.shape[1] != block.in_channels:
                x = torch.cat([x, skips.pop()[: len(x)]], dim=1)
            x = block(x, embedded)
        return (network.out_conv(silu(network.out_norm(x))),)
