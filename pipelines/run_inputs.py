"""What a training run reads, opened on one worker: teacher, pairs, prompts, pictures."""

import logging
from functools import cached_property
from typing import Any

from dmd_core.checkpoint import CheckpointError
from dmd_core.condition import Condition
from dmd_core.decoder import decoded, load_decoder
from dmd_core.losses import REGRESSION_LOSSES, Distance, regression_distance
from dmd_core.noise import stable_seed
from dmd_core.perceptual import load_perceptual
from dmd_core.precision import PrecisionPolicy
from dmd_core.teacher import load_teacher
from pipelines.config import PairsSection, StorageSection
from pipelines.following import FollowedPrompts, Follower, NewerVersions, PairVersions, PinHolder
from pipelines.memory_plan import most_at_once
from pipelines.pair_fit import PairFit
from pipelines.pins import Pins
from pipelines.prompts import PromptList, read_prompts
from pipelines.sample_pictures import SamplePictures
from pipelines.stage_settings import StageKeys
from pipelines.step_data import StepSource
from pipelines.storage import Store, open_store
from pipelines.streams import (
    PictureRef,
    PictureStream,
    PromptStream,
    open_pictures,
    pictures_at_once,
    pictures_digest,
)
from pipelines.teacher_source import local_teacher
from pipelines.train_config import TrainSection
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
        device = group.device(self.section.use_gpu)
        # A network that is sharded never lies whole on the device.
        self.teacher = load_teacher(
            local_teacher(config["teacher"], self._storage),
            device=device,
            network_device="cpu" if self.section.parallel.shards else device,
            size=(self.pairs_section.height, self.pairs_section.width),
            compute_dtype=PrecisionPolicy.named(self.section.mixed_precision).compute,
            to_train=True,
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
        """All workers call it. Raises `CheckpointError` for prompts or pictures that are not those
        the run was started with."""
        self._refuse_changed()
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
        prompts = () if self.versions.segments else self._prompts.prompts
        pairs = self.pairs_section
        if self.section.mixed_precision == "bf16":  # all that a teacher beside a training can do
            pairs = pairs.model_copy(update={"compute_dtype": "bfloat16"})
        return SamplePictures(
            self.teacher, pairs, self.versions, prompts,
            count=self.section.num_validation_images, seed=self.seed,
            at_once=most_at_once(self.section),
        )  # fmt: skip

    @cached_property
    def _prompts(self) -> PromptList:
        return read_prompts(self.pins.prompt_source, self._storage)

    @cached_property
    def _pictures(self) -> tuple[Store, tuple[PictureRef, ...]]:
        return open_pictures(self.section.real_pictures, self._storage)

    def _refuse_changed(self) -> None:
        """Every start of the workers reads prompts and pictures anew. What one worker finds changed
        is refused by all: else the others would wait for it."""
        pins, pictures = self.pins, self.section.real_pictures
        found = {
            f"the prompts of {', '.join(pins.prompts)}": bool(pins.prompts_digest)
            and self._prompts.digest != pins.prompts_digest,
            f"the list of pictures in {pictures}": bool(pins.pictures_digest)
            and pictures_digest(self._pictures[1]) != pins.pictures_digest,
        }
        device = self.teacher.device
        changed = [name for name, here in found.items() if self._group.count(here, device)]
        if changed:
            raise CheckpointError(
                f"{' and '.join(changed)} changed since {self.store.url} was started; put back "
                "what was there and run the same command again, or use another run.dir"
            )

    def _prompt_stream(self) -> PromptStream | FollowedPrompts:
        if not self.pins.prompts:
            return FollowedPrompts(self.versions)
        return PromptStream(self._prompts.prompts, stable_seed(self.seed, "prompts"))

    def _picture_stream(self) -> PictureStream | None:
        if not self.section.uses_gan:
            return None
        store, refs = self._pictures
        size = self.teacher.geometry.pixels(self.shape)
        seed = stable_seed(self.seed, "pictures")
        at_once = pictures_at_once(size, self.teacher.device)
        return PictureStream(store, refs, self.teacher.encode, size, seed, at_once=at_once)
