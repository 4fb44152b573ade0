"""What a training run reads, opened on one worker: teacher, pairs, prompts, pictures."""

import logging
from functools import cached_property
from typing import Any

import ray.train
import torch

from dmd_core.condition import Condition
from dmd_core.decoder import decoded, load_decoder
from dmd_core.losses import REGRESSION_LOSSES, Distance, regression_distance
from dmd_core.noise import stable_seed
from dmd_core.perceptual import load_perceptual
from dmd_core.teacher import load_teacher
from pipelines.config import PairsSection, StorageSection
from pipelines.following import FollowedPrompts, Follower, NewerVersions, PairVersions, PinHolder
from pipelines.memory_plan import most_at_once
from pipelines.pair_fit import PairFit
from pipelines.pins import Pins
from pipelines.prompts import read_prompts
from pipelines.sample_pictures import SamplePictures
from pipelines.step_data import StepSource
from pipelines.storage import Store, open_store
from pipelines.streams import PictureStream, PromptStream, open_pictures
from pipelines.teacher_source import local_teacher
from pipelines.train_config import StageKeys, TrainSection
from pipelines.workers import Group

_logger = logging.getLogger(__name__)


class RunInputs:
    """`config`: as `train_loop` takes it."""

    def __init__(self, config: dict[str, Any], group: Group) -> None:
        self._group = group
        self.section = TrainSection.model_validate(config["train"])
        self.pairs_section = PairsSection.model_validate(config["pairs"])
        self._storage = StorageSection.model_validate(config["storage"])
        self.store: Store = open_store(config["dir"], self._storage)
        self.seed, self.pins = config["seed"], Pins.from_json(config["pins"])
        device = ray.train.torch.get_device() if self.section.use_gpu else torch.device("cpu")
        # A network that is sharded never lies whole on the device.
        self.teacher = load_teacher(
            local_teacher(config["teacher"], self._storage),
            device=device,
            network_device="cpu" if self.section.parallel.shards else device,
            size=(self.pairs_section.height, self.pairs_section.width),
        )
        self._root = open_store(config["root"], self._storage)
        self.versions = PairVersions(self._root, self.pins, self.seed)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C,h,w) of the samples."""
        return self.teacher.latent_shape(self.pairs_section.height, self.pairs_section.width)

    def unconditional(self) -> Condition:
        """What guidance of the real score moves away from: one row; nothing, where no stage has
        guidance (a class-conditional teacher may know no "no class")."""
        if all(keys.guidance_scale == 1.0 for _, keys in self.section.plan()):
            return Condition()
        return self.teacher.encode_negatives([self.pairs_section.negative_prompt])

    def source(self, *, timesteps: int) -> StepSource:
        return StepSource(
            self.teacher,
            seed=self.seed,
            rank=self._group.rank,
            world=self._group.size,
            shape=self.shape,
            timesteps=timesteps,
            prompts=self._prompt_stream(),
            pictures=self._picture_stream(),
        )

    def follower(self, pin: dict[str, str] | None) -> Follower:
        """`pin`: a `PinHolder`, None: the run pins nothing."""
        pairs, newer = self.pairs_section, None
        if self._group.rank == 0:
            fit = PairFit(
                self.teacher.revision, self.teacher.latent_shape, pairs.height, pairs.width
            )
            holder = PinHolder(**pin) if pin else None
            newer = NewerVersions(self._root, fit, holder, _logger.warning)
        return Follower(self.section, self.versions, newer, self._group.share)

    def distance(self, keys: StageKeys) -> Distance | None:
        """The regression loss of a stage: on latents, or on what they decode to. None: it has
        none."""
        if not keys.needs_pairs:
            return None
        if keys.regression_loss in REGRESSION_LOSSES:
            return regression_distance(keys.regression_loss)
        trunk = self.section.perceptual_trunk or None
        resize = self.section.perceptual_resize or None
        measure = load_perceptual(keys.regression_loss, trunk=trunk, resize=resize)
        measure.to(self.teacher.device)
        return decoded(measure, load_decoder(self.teacher, keys.regression_decoder))

    @cached_property
    def sample_pictures(self) -> SamplePictures:
        prompts = () if self.versions.segments else self._prompts()
        return SamplePictures(
            self.teacher, self.pairs_section, self.versions, prompts,
            count=self.section.num_validation_images, seed=self.seed,
            at_once=most_at_once(self.section),
        )  # fmt: skip

    def _prompts(self) -> tuple[str, ...]:
        return tuple(read_prompts(self.pins.prompt_source, self._storage).prompts)

    def _prompt_stream(self) -> PromptStream | FollowedPrompts:
        if not self.pins.prompts:
            return FollowedPrompts(self.versions)
        return PromptStream(self._prompts(), stable_seed(self.seed, "prompts"))

    def _picture_stream(self) -> PictureStream | None:
        if not self.section.uses_gan:
            return None
        store, refs = open_pictures(self.section.real_pictures, self._storage)
        size = self.teacher.geometry.pixels(self.shape)
        seed = stable_seed(self.seed, "pictures")
        return PictureStream(store, refs, self.teacher.encode, size, seed)
