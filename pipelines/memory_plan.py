"""Do the networks of a run fit a GPU? Added up beforehand, without loading one.

Weights, optimizers and averages are exact from the parameter counts. What passes hold is found by
playing the true network through without memory (`dmd_core.pass_memory`); the work space of
convolutions and an allocator's waste are not in that, so the whole is an estimate, some tenths off
at worst. A perceptual loss, and what is drawn and encoded for the next step, are coarse figures
(`pipelines.memory_estimates`). Not in it: the VAE while it decodes sample pictures, a megapixel at
a time, between updates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from dmd_core.pass_memory import PassMemory
from pipelines.config import PairsSection
from pipelines.memory_estimates import GIB, drawn_bytes, encoding_bytes, regression_bytes
from pipelines.network_sizes import BF16, FLOAT, NetworkSizes
from pipelines.stage_settings import StageKeys
from pipelines.train_config import TrainSection

# What a process has of a card that is sold as so many GB.
GPUS: dict[str, float] = {"24 GB": 22.0, "40 GB": 39.0, "80 GB": 79.0, "141 GB": 139.0}
_CONTEXT = GIB  # CUDA, its kernels, libraries
_WASTE = 0.05  # of what passes hold
_ADAM = 8  # bytes per parameter

# (mixed precision?, gradient checkpointing?) → what a pass holds; None: not known
Passes = Callable[[bool, bool], PassMemory | None]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device of one worker, by what they are for. `complete` is False where what
    passes hold is not known."""

    parts: dict[str, int]
    complete: bool

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def fits(self, gib: float) -> bool:
        return self.total <= gib * GIB


@dataclass(frozen=True)
class Change:
    """Settings that need less memory: keys of the `train` section → value."""

    settings: dict[str, Any]

    def apply(self, section: TrainSection) -> TrainSection:
        own = {key: value for key, value in self.settings.items() if "." not in key}
        parallel = {
            key.removeprefix("parallel."): value
            for key, value in self.settings.items()
            if key.startswith("parallel.")
        }
        own["parallel"] = section.parallel.model_copy(update=parallel)
        return section.model_copy(update=own)

    def in_words(self) -> str:
        return ", ".join(f"train.{key}: {_yaml(value)}" for key, value in self.settings.items())


# ---------------------------------------------------------------- training


def training_memory(
    sizes: NetworkSizes, section: TrainSection, passes: Passes, *, distilled: bool = False
) -> MemoryPlan:
    """Of one worker of the smallest group that the recipe allows. `distilled`: guidance is an input
    of the teacher's network, not a second pass."""
    workers, parallel = _workers(section), section.parallel
    width = training_width(section)
    trained = sizes.adapters if section.trainable == "lora" else sizes.denoiser
    student = _sharing(parallel.generator, workers)
    fake = _sharing(parallel.fake, workers)
    shares = [(keys, _own(section, keys)) for _, keys in section.plan()]
    parts = {
        "teacher": _teacher(sizes, section, workers),
        "text encoders, VAE": sizes.frozen_others(width),
        "student": _student(sizes, section, student),
        "student's AdamW": _ADAM * trained / student,
        "fake score": FLOAT * sizes.denoiser / fake + _gathered(sizes, fake, FLOAT),
        "fake score's AdamW": _ADAM * (sizes.denoiser + sizes.head) / fake,
        "discriminator's head": FLOAT * sizes.head * (1 / fake + (fake > 1)),  # and whole, at work
        "data of two steps": max(drawn_bytes(sizes, keys, *own) for keys, own in shares),
        "encoders at work": max(
            encoding_bytes(sizes, keys, section.use_gpu, *own) for keys, own in shares
        ),
        "CUDA": _CONTEXT,
    }
    if section.ema_halflife_samples:
        parts["student's average"] = FLOAT * trained / student
    if workers > 1:
        buckets = trained * (student == 1) + (sizes.denoiser + sizes.head) * (fake == 1)
        parts["DDP's gradient buckets"] = FLOAT * buckets
    memory = passes(width == BF16, parallel.gradient_checkpointing)
    if memory is not None:
        busiest = max(
            _stage_passes(sizes, section, keys, memory, workers, distilled)
            for _, keys in section.plan()
        )
        parts["gradients and passes"] = busiest * (1 + _WASTE)
    return MemoryPlan({name: round(size) for name, size in parts.items()}, memory is not None)


def samples_at_once(section: TrainSection, keys: StageKeys) -> tuple[int, int]:
    """(fresh, paired) samples in one pass of a worker of the smallest group."""
    own, micro = _own(section, keys), section.micro_batch_size
    fresh, pairs = own if micro is None else [-(-n // -(-n // micro)) if n else 0 for n in own]
    return fresh, pairs


def _own(section: TrainSection, keys: StageKeys) -> tuple[int, int]:
    """(fresh, paired) samples of an update that are a worker's, in the smallest group."""
    paired = keys.regression_batch_size if keys.needs_pairs else 0
    workers = _workers(section)
    return -(-keys.train_batch_size // workers), -(-paired // workers)


def most_at_once(section: TrainSection) -> int:
    """The most samples in one pass of a worker of the smallest group, of either batch."""
    return max(max(samples_at_once(section, keys)) for _, keys in section.plan())


def _stage_passes(
    sizes: NetworkSizes,
    section: TrainSection,
    keys: StageKeys,
    memory: PassMemory,
    workers: int,
    distilled: bool,
) -> float:
    """The larger of the generator's update and the fake score's; gradients are in it."""
    fresh, paired = samples_at_once(section, keys)
    scored = fresh + paired * keys.pairs_in_dm
    judging = keys.gan_weight > 0
    student = _sharing(section.parallel.generator, workers)
    fake = _sharing(section.parallel.fake, workers)
    trained = sizes.adapters if section.trainable == "lora" else sizes.denoiser

    spared = _not_cast(sizes, section)
    held = max(0.0, memory.held_by(fresh + paired) - spared)
    cast = BF16 * sizes.denoiser if training_width(section) == BF16 else 0
    scores = _scoring(keys, memory, scored, cast, distilled)
    judged = memory.held_by(fresh) if judging else 0.0
    compared = regression_bytes(sizes, keys, section.perceptual_resize, paired)
    # Of a pass's peak, the gradients of a whole network in float32 are a part.
    elsewhere = FLOAT * (sizes.denoiser - trained / student)
    peak = memory.peak_of(fresh + paired) - elsewhere - spared
    generator = max(held + max(scores, judged, compared), peak)
    seen = scored + (3 if keys.r1_weight else 2) * fresh * judging
    elsewhere = FLOAT * sizes.denoiser * (1 - 1 / fake)
    score = max(memory.held_by(seen), memory.peak_of(seen) - elsewhere)
    return max(generator, score + FLOAT * sizes.head * judging)  # its gradients are whole, too


def _not_cast(sizes: NetworkSizes, section: TrainSection) -> int:
    """Of what a pass of a wholly trained network holds: the copies of its weights that autocast
    makes for the backward pass, which a network under adapters, held in bfloat16, has no need of.
    With checkpointing they are gone at the end of each block."""
    adapted = section.trainable == "lora" and not section.parallel.gradient_checkpointing
    return BF16 * sizes.matrices if adapted and training_width(section) == BF16 else 0


def _scoring(
    keys: StageKeys, memory: PassMemory, samples: float, cast: float, distilled: bool
) -> float:
    """Of the real score, then the fake one, both without gradient; the former looks twice where
    `GuidedDenoiser` does. `cast`: weights that are also in bfloat16, of the one that is trained."""
    if not keys.dm_weight:
        return 0.0
    once = distilled or keys.guidance_scale == 1
    real = memory.frozen_of(samples if once else 2 * samples)
    return max(real, memory.frozen_of(samples) + cast)


def _teacher(sizes: NetworkSizes, section: TrainSection, workers: int) -> float:
    placement, width = section.parallel.teacher, training_width(section)
    whole = sizes.frozen_denoiser(width)
    if placement == "replicated":
        return whole
    share = 0.0 if placement == "offload" else whole / workers
    # Sent, and at work, in the dtype of the passes: see `dmd_core.parallel.shard`.
    return share + 2 * width * sizes.block


def _student(sizes: NetworkSizes, section: TrainSection, sharing: int) -> float:
    """Under adapters it is frozen itself."""
    if section.trainable == "full":
        return FLOAT * sizes.denoiser / sharing + _gathered(sizes, sharing, FLOAT)
    whole = sizes.frozen_denoiser(training_width(section)) + FLOAT * sizes.adapters
    return whole / sharing + _gathered(sizes, sharing, training_width(section))


def _gathered(sizes: NetworkSizes, sharing: int, width: int) -> float:
    """Blocks that are whole for a moment: the one at work and the next."""
    return 2 * width * sizes.block if sharing > 1 else 0.0


def training_width(section: TrainSection) -> int:
    """Bytes of a number that passes compute in."""
    return BF16 if section.mixed_precision == "bf16" else FLOAT


def _sharing(strategy: str, workers: int) -> int:
    return workers if strategy == "fsdp" else 1


def _workers(section: TrainSection) -> int:
    size = section.group_size
    return size if isinstance(size, int) else size[0]


# ---------------------------------------------------------------- what would make it fit


def fitting_change(
    section: TrainSection, gib: float, plan_of: Callable[[TrainSection], MemoryPlan]
) -> Change | None:
    """The least that makes a run fit: as few changes as possible, earlier ones of `_changes`
    first. None: nothing here does."""
    candidates = _changes(section)
    for count in range(1, len(candidates) + 1):
        for chosen in combinations(candidates, count):
            change = Change({key: value for one in chosen for key, value in one.items()})
            if len(change.settings) < sum(map(len, chosen)):
                continue  # two values of one key
            if plan_of(change.apply(section)).fits(gib):
                return change
    return None


def _changes(section: TrainSection) -> list[dict[str, Any]]:
    """What costs least comes first."""
    parallel, workers = section.parallel, _workers(section)
    changes: list[dict[str, Any]] = []
    if section.mixed_precision == "no":
        changes.append({"mixed_precision": "bf16"})
    sizes = [size for size in (16, 4, 1) if size < most_at_once(section)]
    changes += [{"micro_batch_size": size} for size in sizes]
    if not parallel.gradient_checkpointing:
        changes.append({"parallel.gradient_checkpointing": True})
    if workers > 1 and "ddp" in (parallel.generator, parallel.fake):
        changes.append({"parallel.generator": "fsdp", "parallel.fake": "fsdp"})
    if parallel.teacher != "offload":
        changes.append({"parallel.teacher": "offload"})
    if section.trainable == "full":
        changes.append({"trainable": "lora"})
    return changes


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------- sampling, checkpoints


def sampling_memory(
    sizes: NetworkSizes, section: PairsSection, passes: Passes, *, distilled: bool = False
) -> MemoryPlan:
    """Of one teacher of `dmd pairs`; `distilled` as in `training_memory`."""
    width = BF16 if section.compute_dtype == "bfloat16" else FLOAT
    parts: dict[str, float] = {
        "teacher": sizes.frozen_denoiser(width),
        "text encoders, VAE": sizes.frozen_others(width),
        "CUDA": _CONTEXT,
    }
    memory = passes(width == BF16, False)
    if memory is not None:
        twice = section.guidance_scale > 1 and not distilled  # as `integrate` does
        rows = section.batch_size * (2 if twice else 1)
        parts["passes"] = memory.frozen_of(rows) * (1 + _WASTE)
    return MemoryPlan({name: round(size) for name, size in parts.items()}, memory is not None)


def checkpoint_bytes(sizes: NetworkSizes, section: TrainSection) -> int:
    """Of one checkpoint on the store: trained weights, both optimizers, the moving average."""
    trained = sizes.adapters if section.trainable == "lora" else sizes.denoiser
    average = trained if section.ema_halflife_samples else 0
    return (FLOAT + _ADAM) * (trained + sizes.denoiser + sizes.head) + FLOAT * average
