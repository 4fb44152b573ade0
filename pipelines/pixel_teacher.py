"""Training a class-conditional pixel teacher on CIFAR-10 as a Ray Train job.

Adam, a moving average of the weights with a half-life in samples, mirrored pictures. The learning
rate is warmed up and, unlike EDM's, brought to zero at the end: a short training gains from it.
"""

import copy
import json
from pathlib import Path
from typing import Any

import ray.train
import torch
from torch import nn

from dmd_core import edm_training as core
from dmd_core.checkpoint import Checkpoint, pack_optimizer, unpack_optimizer
from dmd_core.ema import Ema
from dmd_core.teacher_training import warmup_and_decay
from pipelines import cifar10
from pipelines.config import StorageSection, TeacherTrainSection
from pipelines.storage import Store, open_store
from pipelines.teacher_loop import TeacherLoop

CLASSES_FILE = "classes.json"  # what a prompt of the teacher may be, in the order of the labels


def train_pixel_teacher_loop(config: dict[str, Any]) -> None:
    """One worker of `dmd train-teacher`. `config`: section, seed, dir, storage, board."""
    section = TeacherTrainSection.model_validate(config["section"])
    storage = StorageSection.model_validate(config["storage"])
    data = cifar10.load_split(
        open_store(section.pixel.path, storage), "train", section.max_pictures
    )
    store = open_store(config["dir"], storage)
    _PixelRun(section, config["seed"], store, config.get("board"), data).run()


def pixel_size(section: TeacherTrainSection) -> core.PixelSize:
    pixel = section.pixel
    return core.PixelSize(
        image_size=cifar10.SIDE,
        channels=pixel.channels,
        layers_per_block=pixel.layers_per_block,
        attention_levels=pixel.attention_levels,
        dropout=pixel.dropout,
        classes=len(cifar10.CLASSES),
        no_class=pixel.class_dropout > 0,
    )


class _PixelRun(TeacherLoop):
    def __init__(
        self,
        section: TeacherTrainSection,
        seed: int,
        store: Store,
        board: Any,
        data: cifar10.Part,
    ) -> None:
        super().__init__(section, seed, store, board, ends=(section.total_steps,))
        self.data = data
        torch.manual_seed(seed)
        self.unet = core.build_unet(pixel_size(section))
        on_device: nn.Module = self.unet.to(self.device)  # type: ignore[assignment]
        on_device.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = Ema(self.unet.state_dict(), section.pixel.ema_halflife_samples)
        self.optimizer = torch.optim.Adam(self.unet.parameters(), lr=1.0, betas=(0.9, 0.999))

    def run(self) -> None:
        self.restore()
        self.unet.train()
        network = self.parallel(self.unet)
        while self.step < self.total:
            self._one_step(network)
        if self.rank == 0:
            self._write_pipeline()
        ray.train.report({"step": self.step})

    def _one_step(self, network: nn.Module) -> None:
        section, rng = self.section, self.rng("edm")
        batch = core.sample_batch(
            self.data.pictures,
            self.data.labels,
            rng,
            batch_size=self.share(section.unet_batch_size),
            class_dropout=section.pixel.class_dropout,
            no_class=len(cifar10.CLASSES),
            p_mean=section.pixel.p_mean,
            p_std=section.pixel.p_std,
        )
        batch = core.EdmBatch(*(value.to(self.device) for value in vars(batch).values()))
        torch.manual_seed(int(rng.integers(2**62)))  # dropout
        factor = warmup_and_decay(self.step, total=self.total, warmup=section.lr_warmup_steps)
        self.update(
            lambda: core.edm_loss(network, batch),
            self.optimizer,
            self.unet.parameters(),
            lr=section.unet_learning_rate * factor,
            label="UNet",
        )
        self._average()  # before the step may be saved
        self.after_step("UNet")

    def _average(self) -> None:
        batch = self.section.unet_batch_size
        halflife = self.section.pixel.ema_halflife_samples
        self.ema.halflife_samples = core.ema_halflife(self.step * batch, halflife)
        self.ema.update(self.unet.state_dict(), batch)

    def stored(self) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = {
            "model": dict(self.unet.state_dict()),
            "ema": dict(self.ema.average),
            "optimizer": pack_optimizer(self.optimizer),
        }
        return parts, {}

    def take(self, found: Checkpoint) -> None:
        self.unet.load_state_dict(found.parts["model"])
        self.ema.load(found.parts["ema"])
        unpack_optimizer(self.optimizer, found.parts["optimizer"])

    def _write_pipeline(self) -> None:
        """The average as a pipeline folder, with the classes' names; files small enough to move."""
        unet = copy.deepcopy(self.unet).cpu()
        unet.load_state_dict(self.ema.average)
        unet.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        output = Path(self.section.output)
        core.build_pipeline(unet.eval()).save_pretrained(output, max_shard_size="15MB")
        (output / CLASSES_FILE).write_text(json.dumps(list(cifar10.CLASSES)))
