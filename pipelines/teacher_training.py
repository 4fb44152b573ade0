"""Training the miniature teacher as a Ray Train job: VAE, latents, UNet, pipeline folder.

Two stages on one step counter: steps 0 … vae_steps − 1 train the VAE, the rest the UNet with its
text encoder. A run with `start_from` has no VAE stage.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTokenizer

from dmd_core import teacher_training as core
from dmd_core.checkpoint import (
    Checkpoint,
    committed_steps,
    pack_optimizer,
    unpack_optimizer,
)
from dmd_core.files import write_atomic
from dmd_core.miniature import (
    MiniatureSize,
    Vocabulary,
    assemble,
    build_miniature,
    learn_vocabulary,
)
from dmd_core.pipeline_files import save_pipeline
from dmd_core.schedule import Schedule
from dmd_core.teacher import load_teacher
from pipelines import emoji
from pipelines.config import StorageSection, TeacherTrainSection
from pipelines.storage import Store, open_store
from pipelines.teacher_loop import TeacherLoop


def train_teacher_loop(config: dict[str, Any]) -> None:
    """One worker of `dmd train-teacher`. `config`: section, seed, dir, storage, board."""
    section = TeacherTrainSection.model_validate(config["section"])
    store = open_store(config["dir"], StorageSection.model_validate(config["storage"]))
    _TeacherRun(section, config["seed"], store, config.get("board")).run()


class _TeacherRun(TeacherLoop):
    def __init__(self, section: TeacherTrainSection, seed: int, store: Store, board) -> None:
        ends = (section.vae_steps, section.total_steps)
        super().__init__(section, seed, store, board, ends=ends)
        self.items = emoji.load_emoji()[: section.max_pictures]
        self.held_out = emoji.held_out(self.items)
        torch.manual_seed(seed)
        size = MiniatureSize(
            image_size=section.image_size,
            unet_channels=section.unet_channels,
            vae_channels=section.vae_channels,
        )
        train_captions = [
            item.caption for item, held in zip(self.items, self.held_out, strict=True) if not held
        ]
        self.pipeline = build_miniature(size, self._vocabulary(train_captions, size))
        if section.start_from and not committed_steps(store.fs, self.checkpoints):
            self._take_weights(section.start_from)
        self.vae = self.pipeline.vae.to(self.device)
        self.model = core.TextConditionalUNet(self.pipeline.unet, self.pipeline.text_encoder)
        on_device: Any = self.model.to(self.device)
        on_device.to(memory_format=torch.channels_last)
        self.ema = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(section.ema_decay), use_buffers=False
        )
        self.schedule = Schedule.from_scheduler(self.pipeline.scheduler)
        self.vae_optimizer = torch.optim.AdamW(self.vae.parameters(), lr=1.0, weight_decay=0.0)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.01
        )

    def _vocabulary(self, captions: list[str], size: MiniatureSize) -> Vocabulary:
        """Learned (or taken from `start_from`) once, by rank 0 of the first start, and kept.

        The embeddings go by its ids.
        """
        path = self.store.path("vocabulary.json")
        if self.rank == 0 and not self.store.fs.exists(path):
            start = self.section.start_from
            vocabulary = _read_vocabulary(start) if start else learn_vocabulary(captions, size)
            write_atomic(self.store.fs, path, json.dumps(vars(vocabulary)).encode())
        if self.world > 1:
            torch.distributed.barrier()
        kept = json.loads(self.store.fs.cat_file(path))
        merges = tuple((left, right) for left, right in kept["merges"])
        return Vocabulary(kept["tokens"], merges)

    def _take_weights(self, folder: str) -> None:
        """At a first start only: a restart goes on from its checkpoint."""
        source = load_teacher(folder).pipeline
        for name in ("vae", "unet", "text_encoder"):
            getattr(self.pipeline, name).load_state_dict(getattr(source, name).state_dict())
        self.pipeline.vae.register_to_config(scaling_factor=source.vae.config.scaling_factor)

    # ------------------------------------------------------------------ the journey of a run

    def run(self) -> None:
        self.restore()
        pictures = emoji.load_pictures(self.items, self.section.image_size)
        kept = ~np.asarray(self.held_out)
        if self.step < self.section.vae_steps:
            self._train_vae(pictures[kept])
        if self.step < self.total:
            self._train_unet(self._latents(pictures, kept))
        if self.rank == 0:
            self._write_pipeline()
        ray.train.report({"step": self.step})

    def _train_vae(self, pictures: np.ndarray) -> None:
        section = self.section
        data = core.pictures_to_tensor(pictures)
        network = self.parallel(_VaeLoss(self.vae))
        while self.step < section.vae_steps:
            rng = self.rng("vae")
            rows = torch.from_numpy(
                rng.integers(len(data), size=self.share(section.vae_batch_size))
            )
            batch = data[rows]
            mirrored = torch.from_numpy(rng.random(len(batch)) < 0.5)
            batch[mirrored] = batch[mirrored].flip(3)
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            self.update(
                lambda batch=batch, generator=generator: network(batch.to(self.device), generator),
                self.vae_optimizer,
                self.vae.parameters(),
                lr=section.vae_learning_rate
                * core.warmup_and_decay(self.step, total=section.vae_steps, warmup=100),
                label="VAE",
            )
            self.after_step("VAE")

    def _latents(self, pictures: np.ndarray, kept: np.ndarray) -> core.LatentSet:
        """The frozen VAE's latents of the training pictures, scaled to unit variance."""
        self.vae.eval().requires_grad_(False)
        data = core.pictures_to_tensor(pictures[kept]).to(self.device)
        plain = core.encode_pictures(self.vae, data)
        mirror = torch.tensor(
            [item.mirrorable for item, keep in zip(self.items, kept, strict=True) if keep]
        )
        second = plain.clone()
        second[mirror] = core.encode_pictures(self.vae, data[mirror].flip(3))
        if not self.section.start_from:  # whose network knows its own scale
            self.vae.register_to_config(scaling_factor=1.0 / float(plain.std()))
        scale = self.vae.config.scaling_factor
        captions = [item.caption for item, keep in zip(self.items, kept, strict=True) if keep]
        # Half of the pictures are skin-tone variants of some 300; without weights they would
        # take half of the training.
        weights = np.array(
            [
                self.section.skin_tone_weight**item.skin_tones
                for item, keep in zip(self.items, kept, strict=True)
                if keep
            ]
        )
        latents = (torch.stack([plain, second], dim=1) * scale).cpu()
        return core.LatentSet(latents, self._tokens(captions), weights / weights.sum())

    def _train_unet(self, data: core.LatentSet) -> None:
        section = self.section
        network = self.parallel(self.model)
        empty_ids = self._tokens([""])[0]
        while self.step < self.total:
            batch = core.sample_batch(
                data,
                self.schedule,
                self.rng("unet"),
                batch_size=self.share(section.unet_batch_size),
                caption_dropout=section.caption_dropout,
                empty_ids=empty_ids,
                timestep_power=section.timestep_power,
            )
            batch = replace(
                batch, **{name: value.to(self.device) for name, value in vars(batch).items()}
            )
            factor = core.warmup_and_decay(
                self.step - section.vae_steps,
                total=section.unet_steps,
                warmup=section.lr_warmup_steps,
            )
            self.update(
                lambda batch=batch: core.denoiser_loss(network, batch, self.schedule),
                self.optimizer,
                self.model.parameters(),
                lr=section.unet_learning_rate * factor,
                label="UNet",
            )
            self.ema.update_parameters(self.model)  # before the step may be saved
            self.after_step("UNet")

    # ------------------------------------------------------------------ its state and its result

    def stored(self) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = {
            "vae": dict(self.vae.state_dict()),
            "model": dict(self.model.state_dict()),
            "ema": dict(self.ema.state_dict()),
            "vae_optimizer": pack_optimizer(self.vae_optimizer),
            "optimizer": pack_optimizer(self.optimizer),
        }
        return parts, {"scaling_factor": self.vae.config.scaling_factor}

    def take(self, found: Checkpoint) -> None:
        self.vae.load_state_dict(found.parts["vae"])
        self.model.load_state_dict(found.parts["model"])
        self.ema.load_state_dict(found.parts["ema"])
        unpack_optimizer(self.vae_optimizer, found.parts["vae_optimizer"])
        unpack_optimizer(self.optimizer, found.parts["optimizer"])
        self.vae.register_to_config(scaling_factor=found.state["scaling_factor"])

    def _write_pipeline(self) -> None:
        averaged: Any = self.ema.module
        pipeline = assemble(
            {
                "vae": self.vae,
                "text_encoder": averaged.text_encoder,
                "tokenizer": self.pipeline.tokenizer,
                "unet": averaged.unet,
                "scheduler": self.pipeline.scheduler,
            }
        )
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            part.to("cpu", torch.float16)
        # Small enough files for any version control and transfer.
        save_pipeline(pipeline, self.section.output, max_shard_size="8MB")
        # transformers loads in the dtype of this entry, diffusers in float32: let both agree.
        config = Path(self.section.output) / "text_encoder" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}))

    def _tokens(self, captions: list[str]) -> torch.Tensor:
        return self.pipeline.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids


def _read_vocabulary(folder: str) -> Vocabulary:
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return Vocabulary(model["vocab"], tuple((left, right) for left, right in model["merges"]))


class _VaeLoss(nn.Module):
    """The VAE's loss as a module, so that DDP sees one forward pass."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return core.vae_loss(self.vae, pictures, generator)
