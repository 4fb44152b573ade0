"""Everything one training iteration needs, drawn from streams and keyed random numbers.

Every random number is keyed by (run seed, purpose, sample index), never by rank or step, and
sample i of a stream is the same sample on any number of workers.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from dmd_core.noise import sample_noise, sample_uniform, stable_seed
from dmd_core.step_types import PairedPart, Pictures, StepData, StepNoise, Unpaired
from dmd_core.teacher import Teacher
from dmd_core.types import PairBatch
from pipelines.batches import part_of_batch
from pipelines.stage_settings import StageKeys, StageSection, stage_steps
from pipelines.streams import PictureStream


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps, stage, and how far each stream has been read (in samples)."""

    step: int = 0
    stage: int = 0
    step_in_stage: int = 0
    prompts: int = 0
    pairs: int = 0
    pictures: int = 0

    def after_step(self, keys: StageKeys) -> "Progress":
        drawn = keys.train_batch_size * keys.fake_updates
        return replace(
            self,
            step=self.step + 1,
            step_in_stage=self.step_in_stage + 1,
            prompts=self.prompts + drawn,
            pairs=self.pairs + (keys.regression_batch_size if keys.needs_pairs else 0),
            pictures=self.pictures + (drawn if keys.gan_weight > 0 else 0),
        )

    def stage_is_over(
        self, stage: StageSection, keys: StageKeys, metrics: dict[str, float] | None
    ) -> bool:
        """`metrics`: those of the window that ends with this step, None inside a window."""
        if self.step_in_stage >= stage_steps(stage, keys):
            return True
        if stage.until is None or metrics is None or stage.until.metric not in metrics:
            return False
        return stage.until.holds(metrics[stage.until.metric])

    def next_stage(self) -> "Progress":
        return replace(self, stage=self.stage + 1, step_in_stage=0)


class PairSource(Protocol):
    """An endless stream of pairs: a version's, or those of several after one another."""

    def batch_from(
        self, position: int, global_batch: int, rank: int = 0, world_size: int = 1
    ) -> PairBatch: ...


class PromptSource(Protocol):
    """An endless stream of prompts: a list's, or those of the pairs."""

    def batch_from(
        self, position: int, global_batch: int, rank: int = 0, world_size: int = 1
    ) -> tuple[str, ...]: ...


class StepSource:
    """`draw(progress, keys)` is a pure function of its arguments: to resume is to ask again.

    `pairs` and `pictures` are None where no stage needs them.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        seed: int,
        rank: int,
        world: int,
        shape: tuple[int, ...],
        timesteps: int,
        prompts: PromptSource,
        pictures: PictureStream | None,
    ) -> None:
        self._teacher, self._seed, self._rank, self._world = teacher, seed, rank, world
        self._shape, self._timesteps = shape, timesteps
        self._prompts, self._pictures = prompts, pictures

    def draw(self, progress: Progress, keys: StageKeys, pairs: PairSource | None) -> StepData:
        paired, pair_samples = self._paired(progress, keys, pairs)
        also = pair_samples if keys.pairs_in_dm else []
        unpaired = tuple(
            self._unpaired(progress, keys, update, also) for update in range(keys.fake_updates)
        )
        return StepData(unpaired, paired)

    def _unpaired(self, at: Progress, keys: StageKeys, update: int, also: list[int]) -> Unpaired:
        # One step for all workers, another for every update: the fake score sees all of them.
        drawn = stable_seed(self._seed, "student step", at.step, update)
        student_step, size = drawn % self._timesteps, keys.train_batch_size
        position = at.prompts + update * size
        prompts = self._prompts.batch_from(position, size, self._rank, self._world)
        samples = self._samples(position, size)
        first = samples if update == 0 else []  # only the first serves the generator
        judged = first if keys.gan_weight > 0 else []
        # Outputs on stored noise are scored once per update, each time at other noise.
        extra, extra_first = also, also if update == 0 else []
        noise = StepNoise(
            z=tuple(self._eps(_purpose("z", k), samples) for k in range(student_step + 1)),
            eps_dm=self._both(self._eps, "eps_dm", first, extra_first, 0),
            u_dm=self._both(self._u, "u_dm", first, extra_first, 0),
            eps_fake=self._both(self._eps, "eps_fake", samples, extra, update),
            u_fake=self._both(self._u, "u_fake", samples, extra, update),
            eps_gan=self._eps("eps_gan", judged),
            u_gan=self._u("u_gan", judged),
        )
        cond = self._teacher.encode_prompts(prompts)
        return Unpaired(cond, noise, self._real(at, keys, update, samples), student_step)

    def _real(
        self, at: Progress, keys: StageKeys, update: int, samples: list[int]
    ) -> Pictures | None:
        if keys.gan_weight == 0 or self._pictures is None:
            return None
        size = keys.train_batch_size
        position = at.pictures + update * size
        latents, prompts = self._pictures.batch_from(position, size, self._rank, self._world)
        ids = self._samples(position, size)
        return Pictures(
            x=self._placed(latents),
            cond=self._teacher.encode_prompts(prompts),
            eps=self._eps("eps_real", ids),
            u=self._u("u_real", ids),
            eps_x=self._eps("eps_judged", samples),
            u_x=self._u("u_judged", samples),
            eps_r1=self._eps("eps_r1", ids) if keys.r1_weight > 0 else None,
        )

    def _paired(
        self, at: Progress, keys: StageKeys, pairs: PairSource | None
    ) -> tuple[PairedPart | None, list[int]]:
        if not keys.needs_pairs or pairs is None:
            return None, []
        size = keys.regression_batch_size
        batch = pairs.batch_from(at.pairs, size, self._rank, self._world)
        part = PairedPart(
            eps=self._placed(batch.noise.float()),
            y=self._placed(batch.latents.float()),
            cond=self._teacher.encode_prompts(batch.prompts),
        )
        return part, self._samples(at.pairs, size)

    # ------------------------------------------------------------------ keyed numbers

    def _samples(self, position: int, size: int) -> list[int]:
        """Indices into the whole stream of this worker's part of a global batch."""
        part = part_of_batch(size, self._rank, self._world)
        return list(range(position + part.start, position + part.stop))

    def _seeds(self, purpose: str, samples: list[int]) -> list[int]:
        return [stable_seed(self._seed, purpose, sample) for sample in samples]

    def _eps(self, purpose: str, samples: list[int]) -> torch.Tensor:
        return self._placed(sample_noise(self._seeds(purpose, samples), self._shape))

    def _u(self, purpose: str, samples: list[int]) -> torch.Tensor:
        return self._placed(sample_uniform(self._seeds(purpose, samples)))

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the teacher's device. From pinned memory the copy waits for nothing: from other memory
        it would wait for all that the GPU has been given to do."""
        device = self._teacher.device
        if device.type != "cuda":
            return tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)

    def _both(
        self, draw, purpose: str, samples: list[int], pair_samples: list[int], update: int
    ) -> torch.Tensor:
        """Numbers of the fresh samples, then of the student's outputs on stored noise."""
        fresh = draw(purpose, samples)
        if not pair_samples:
            return fresh
        return torch.cat([fresh, draw(_purpose(f"pair_{purpose}", update), pair_samples)])


def _purpose(name: str, index: int) -> str:
    return name if index == 0 else f"{name}{index}"
