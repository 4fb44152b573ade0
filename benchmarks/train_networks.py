"""The networks that both sides of `benchmarks.train` train, and what a case says of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.parity_reference import add_clone, shake
from benchmarks.published import letters_tokenizer, write_published
from dmd_core.miniature import (
    MiniatureSize,
    assemble,
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
)

# Packages that DMD2's scripts import; what is run of them needs none.
STAND_INS = (
    *("imageio", "imageio.v2", "lmdb", "wandb", "peft", "torchvision", "tqdm"),
    *("distutils", "distutils.util"),
)
SIZES = ("tiny", "small", "full")
GUIDANCE_SCALE = 1.75  # of the real score of Stable Diffusion 1.5, by their scripts
# The weights of their scripts with a GAN: generator's, guidance's; and one learning rate, small
# enough that random networks stay finite.
GAN_WEIGHTS = {"sd": (1e-3, 1e-2), "edm": (3e-3, 1e-2)}
LEARNING_RATE = 1e-6
_SD_SIZES = {
    "tiny": MiniatureSize(
        image_size=16,
        vae_channels=(8, 8, 16),
        unet_channels=(16, 32),
        heads=2,
        text_dim=16,
        text_layers=1,
        max_tokens=12,
        norm_groups=4,
    ),
    "small": MiniatureSize(image_size=64, unet_channels=(96, 192)),
}
_EDM_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "img_resolution": 8,
        "label_dim": 5,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [],
    },
    "small": {
        "img_resolution": 16,
        "label_dim": 10,
        "model_channels": 64,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [8],
    },
    "full": {  # their ImageNet experiment
        "img_resolution": 64,
        "label_dim": 1000,
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
    },
}


@dataclass(frozen=True)
class Case:
    """What is trained, and how. `folder`: the Stable Diffusion teacher (`write_teacher`); `clone`:
    of tianweiy/DMD2; `micro_batch_size`: of our side only, theirs has no such thing."""

    path: Literal["sd", "edm"]
    gan: bool
    precision: Literal["no", "bf16"]
    batch_size: int
    fake_updates: int
    size: str
    folder: str
    clone: str
    gpu: bool = False
    micro_batch_size: int | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpu else "cpu")

    @property
    def name(self) -> str:
        losses = "DM + GAN" if self.gan else "DM"
        what = {"sd": "Stable Diffusion", "edm": "EDM"}[self.path]
        return f"{what}, {losses}, {'float32' if self.precision == 'no' else 'bfloat16'}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C,h,w) of a sample."""
        if self.path == "edm":
            return 3, self.edm["img_resolution"], self.edm["img_resolution"]
        side = 64 if self.size == "full" else _SD_SIZES[self.size].latent_size
        return 4, side, side

    @property
    def edm(self) -> dict[str, Any]:
        return _EDM_SIZES[self.size]


@dataclass(frozen=True)
class Contestant:
    """`step` is one whole training iteration: batch, generator, fake score, optimizers."""

    step: Callable[[], None]
    modules: list[nn.Module]


def write_teacher(size: str, folder: Path) -> None:
    """A Stable Diffusion teacher of random weights, which predicts ε, as theirs must."""
    if size == "full":
        return write_published("sd15", folder, torch.float32)
    shape = _SD_SIZES[size]
    torch.manual_seed(0)
    tokenizer = letters_tokenizer(shape)
    pipeline = assemble(
        {
            "vae": build_vae(shape),
            "text_encoder": build_text_encoder(shape, tokenizer),
            "tokenizer": tokenizer,
            "unet": build_unet(shape),
            "scheduler": build_scheduler("epsilon"),
        }
    )
    pipeline.save_pretrained(folder)


def edm_network(case: Case) -> nn.Module:
    """DMD2's own EDM network, of random weights."""
    add_clone(Path(case.clone), stand_ins=STAND_INS)
    from third_party.edm.training.networks import EDMPrecond  # type: ignore[import-not-found]

    network = EDMPrecond(img_channels=3, dropout=0.0, use_fp16=case.precision == "bf16", **case.edm)
    shake(network, torch.Generator().manual_seed(1), 0.02)
    return network


def real_pictures(case: Case) -> torch.Tensor:
    """(B,C,h,w): what the discriminator takes for real, on the CPU."""
    return 0.5 * torch.randn(
        case.batch_size, *case.shape, generator=torch.Generator().manual_seed(2)
    )


def prompts(case: Case) -> tuple[str, ...]:
    """One for each sample of a batch: a text, or the name of a class."""
    if case.path == "edm":
        return tuple(str(row % case.edm["label_dim"]) for row in range(case.batch_size))
    return tuple(
        f"a picture of {chr(97 + row % 26) * (1 + row // 26)}" for row in range(case.batch_size)
    )
