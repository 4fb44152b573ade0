"""`dmd doctor` on the work itself: teacher, prompts, memory of the networks, the label."""

import json
from collections.abc import Sequence
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch

from dmd_core.families import folder_geometry, guidance_distilled
from dmd_core.pass_memory import PassMemory, UnknownNetworkError, pass_memory
from dmd_core.precision import PrecisionPolicy, stored_dtype
from dmd_core.prediction_check import UNTRAINED, check_prediction, has_readings
from dmd_core.teacher import folder_schedule, load_teacher
from dmd_core.teacher_files import weight_files
from jobs.doctor_checks import Check, one_line
from jobs.placement import is_embedded
from jobs.plans import size_in_words
from jobs.session import Session
from jobs.teacher_here import pair_source
from pipelines.host_memory import converted_bytes, host_memory
from pipelines.memory_plan import (
    GIB,
    GPUS,
    MemoryPlan,
    Passes,
    checkpoint_bytes,
    fitting_change,
    sampling_memory,
    training_memory,
)
from pipelines.network_sizes import NetworkSizes
from pipelines.prompt_files import PromptError, PromptFile, PromptSource, list_files, read_rows
from pipelines.train_config import TrainSection
from pipelines.weights import Weights, denoiser_of, pipeline_weights

_ROWS = 1000  # of the first prompt file with any that are read
_LARGE = 100_000_000  # parameters; a few evaluations of more take minutes without a GPU


def prompts(session: Session) -> Check:
    try:
        source = _prompt_source(session)
        files = list_files(source, session.recipe.storage)
        first = _first_file(source, files)
    except (PromptError, OSError) as error:
        return Check("prompts", "fail", one_line(error), "correct pairs.prompts")
    if first is None:
        names = ", ".join(file.name for file in files[:3])
        return Check("prompts", "fail", f"{names}: no prompts", "correct pairs.prompts")
    name, rows = first
    more = " or more" if rows == _ROWS else ""
    return Check("prompts", "ok", f"{len(files)} files; {rows}{more} rows in {name}")


def _prompt_source(session: Session) -> PromptSource:
    """With the sizes that the teacher can make; where it cannot be had, another check says so."""
    try:
        return pair_source(session.recipe.pairs, session.teacher_dir)
    except (ValueError, OSError):  # TeacherError is a ValueError
        return pair_source(session.recipe.pairs)


def _first_file(source: PromptSource, files: Sequence[PromptFile]) -> tuple[str, int] | None:
    """Name of the first file that is not empty, and its rows, of which no more than `_ROWS` are
    read."""
    for file in files:
        rows = sum(1 for _ in islice(read_rows(file, source.column, source.side_step), _ROWS))
        if rows:
            return file.name, rows
    return None


class TeacherChecks:
    """Of a teacher's local `folder`, which has been found whole."""

    def __init__(self, session: Session, folder: str) -> None:
        self._session, self._folder = session, Path(folder)
        self._weights = pipeline_weights(folder)
        self._denoiser: Weights = denoiser_of(self._weights)
        self._passes: Passes = cache(self._play_through)
        self._unplayed = ""  # why what passes hold is not known
        self._distilled = guidance_distilled(folder)

    @property
    def checkpoint_space(self) -> int:
        """Bytes of the checkpoints that a training keeps at once."""
        return self._checkpoint * (self._session.recipe.train.checkpoints_total_limit + 1)

    # ------------------------------------------------------------------ memory

    def memory(self) -> list[Check]:
        """Training and teachers against usual GPUs, those of this machine, or its RAM."""
        recipe = self._session.recipe
        plan, on_gpu = self._training(recipe.train), recipe.train.use_gpu
        sampling = sampling_memory(
            self._sizes, recipe.pairs, self._passes, distilled=self._distilled
        )
        return [
            self._training_check(plan),
            self._here(
                "memory: training here", plan, on_gpu, 1, recipe.train.most_workers,
                saved=0 if on_gpu else self._checkpoint,
            ),
            *([self._host()] if on_gpu else []),
            self._here(
                "memory: teachers here", sampling, recipe.pairs.gpus_per_actor > 0,
                _share(recipe.pairs.gpus_per_actor), recipe.pairs.most_actors,
            ),
        ]  # fmt: skip

    def _training_check(self, plan: MemoryPlan) -> Check:
        """One line: which GPUs it fits as it is, and with which changes the others."""
        section = self._session.recipe.train
        fits = _fitting(plan)
        found = (
            f"about {size_in_words(plan.total)} per worker ({_largest(plan)}): {_in_words(fits)}"
        )
        found += self._missing(plan)
        advice = []
        for name, gib in GPUS.items():
            if name not in fits:
                change = fitting_change(section, gib, self._training)
                words = change.in_words() if change else "nothing that is known here"
                advice.append(f"{name}: {words}")
        return Check("memory: training", "ok" if fits else "warn", found, "; ".join(advice))

    def _here(
        self,
        name: str,
        plan: MemoryPlan,
        on_gpu: bool,
        per_gpu: int,
        processes: int,
        saved: int = 0,
    ) -> Check:
        """`per_gpu` processes share a GPU; without GPUs all of them share the RAM, with the bytes
        that are `saved` meanwhile."""
        if on_gpu and not torch.cuda.is_available():
            return self._elsewhere(name, plan, per_gpu)
        if on_gpu:
            room, count = torch.cuda.get_device_properties(0).total_memory, per_gpu
        else:
            room, count = psutil.virtual_memory().total, processes
        need = count * plan.total + saved
        copy = f" + {size_in_words(saved)} for the copy that is saved," if saved else ""
        found = f"{count} × {size_in_words(plan.total)}{copy} of {size_in_words(room)}"
        if need <= room:
            return Check(name, "ok", found)
        return Check(name, "fail", found, "fewer or smaller workers; see memory: training")

    def _host(self) -> Check:
        """RAM beside GPUs."""
        recipe = self._session.recipe
        stored = {
            part.part: stored_dtype(weight_files(self._folder / part.part))
            for part in self._weights
        }
        compute = PrecisionPolicy.named(recipe.train.mixed_precision).compute
        others = (part for part in self._weights if part is not self._denoiser)
        converted = (converted_bytes(part, stored[part.part], compute) for part in others)
        mapped = stored[self._denoiser.part] == torch.float32
        needs = host_memory(
            self._sizes, recipe.train, mapped=mapped, converted=max(converted, default=0)
        )
        sizes = {
            "for each worker that starts": needs.start,
            "for the teacher": needs.offloaded,
            "for the copy that is saved, of all workers together": needs.saved,
        }
        words = ", ".join(f"{size_in_words(size)} {what}" for what, size in sizes.items() if size)
        if not is_embedded(recipe):
            return Check("memory: host", "ok", f"{words}; the machines are the cluster's")
        if not torch.cuda.is_available():
            return Check("memory: host", "skip", f"{words}; no GPU here to work beside")
        room, workers = psutil.virtual_memory().total, recipe.train.most_workers
        words += f"; {size_in_words(room)} here"
        if needs.largest(workers) <= room:
            return Check("memory: host", "ok", words)
        fewer = "fewer workers on this machine, or a teacher whose files are in what it is used in"
        advice = fewer if workers * needs.start > room else "train.trainable: lora"
        return Check("memory: host", "fail", words, advice)

    def _elsewhere(self, name: str, plan: MemoryPlan, per_gpu: int) -> Check:
        """Without a GPU here: the sum of those that share one, and which of the usual ones have
        room for it."""
        fits = _fitting(plan, per_gpu)
        found = f"{per_gpu} × {size_in_words(plan.total)}: {_in_words(fits)}{self._missing(plan)}"
        found += "; no GPU here to compare with"
        if fits:
            return Check(name, "skip", found)
        return Check(name, "warn", found, "fewer or smaller workers on a GPU")

    def _missing(self, plan: MemoryPlan) -> str:
        if plan.complete:
            return ""
        return f"; what passes hold is not known and comes on top ({self._unplayed})"

    def _training(self, section: TrainSection) -> MemoryPlan:
        return training_memory(self._sizes, section, self._passes, distilled=self._distilled)

    @property
    def _checkpoint(self) -> int:
        return checkpoint_bytes(self._sizes, self._session.recipe.train)

    @cached_property
    def _sizes(self) -> NetworkSizes:
        """Of the recipe as it is: no change that is tried alters one."""
        recipe = self._session.recipe
        return NetworkSizes.of(str(self._folder), self._weights, recipe.train, recipe.pairs)

    def _play_through(self, bf16: bool, checkpointing: bool) -> PassMemory | None:
        config = self._config(self._denoiser.part)
        try:
            return pass_memory(
                config["_class_name"], config, self._shape(),
                bf16=bf16, checkpointing=checkpointing,
            )  # fmt: skip
        except UnknownNetworkError as error:
            self._unplayed = one_line(error)[:200]
            return None

    def _shape(self) -> tuple[int, ...]:
        """(C,h,w) of the samples that the recipe asks for."""
        pairs = self._session.recipe.pairs
        return folder_geometry(self._folder).shape(pairs.height, pairs.width)

    def _config(self, part: str) -> dict[str, Any]:
        return json.loads((self._folder / part / "config.json").read_text())

    # ------------------------------------------------------------------ the label

    def label(self, *, deep: bool) -> Check:
        """Does the network predict what the scheduler's prediction_type says?"""
        name, on_gpu = "prediction type", torch.cuda.is_available()
        try:
            schedule = folder_schedule(self._folder)
            if not has_readings(schedule):
                return Check(name, "ok", f"{schedule.prediction_type}: cannot be read otherwise")
            size = self._denoiser.parameters
            if size > _LARGE and not on_gpu and not deep:
                found = f"{size / 1e6:.0f} M parameters and no GPU: minutes of work"
                return Check(name, "skip", found, "--deep asks the network all the same")
            return self._asked(name, "cuda" if on_gpu else "cpu")
        except (PromptError, IndexError, OSError) as error:  # a prompt that the teacher cannot read
            advice = "correct pairs.prompts, or teacher.path"
            return Check(name, "fail", one_line(error), advice)
        except ValueError as error:  # TeacherError is one
            return Check(name, "fail", one_line(error), "correct teacher.path")
        except torch.OutOfMemoryError as error:
            advice = (
                "this check loads the teacher in float32, 4 bytes for every weight, which is too "
                "large for this GPU; what pairs need: memory: teachers here"
            )
            return Check(name, "warn", f"not asked: {one_line(error)}", advice)

    def _asked(self, name: str, device: str) -> Check:
        teacher = load_teacher(str(self._folder), device=device)
        verdict = check_prediction(teacher, self._some_prompts())
        errors = ", ".join(f"{key} {value:.2f}" for key, value in verdict.errors.items())
        found = f"labelled {verdict.labelled}; error under each reading: {errors}"
        if verdict.mislabelled:
            return Check(
                name, "fail", f"{found}: it predicts {verdict.best}",
                f"set prediction_type: {verdict.best} in scheduler/scheduler_config.json",
            )  # fmt: skip
        if not verdict.trained:
            advice = f"no reading denoises (expected below {UNTRAINED}): is this teacher trained?"
            return Check(name, "warn", found, advice)
        return Check(name, "ok", found)

    def _some_prompts(self) -> list[str]:
        section = self._session.recipe.pairs
        files = list_files(pair_source(section), self._session.recipe.storage)
        rows = (row for file in files for row in read_rows(file, section.prompt_column))
        some = [row.prompt for row in islice(rows, 8)]
        if not some:
            raise PromptError(f"{', '.join(file.name for file in files[:3])}: no prompts")
        return some


def teacher_checks(session: Session, *, deep: bool) -> tuple[list[Check], int]:
    """All checks of the teacher, and the bytes of a training's checkpoints (0: not known)."""
    try:
        folder = session.teacher_dir
        checks = TeacherChecks(session, folder)
    except (ValueError, OSError) as error:  # TeacherError and WeightsError are ValueErrors
        return [Check("teacher", "fail", one_line(error), "correct teacher.path")], 0
    index = json.loads((Path(folder) / "model_index.json").read_text())
    found = [Check("teacher", "ok", f"{index['_class_name']} in {folder}, every part is there")]
    return [*found, *checks.memory(), checks.label(deep=deep)], checks.checkpoint_space


def _fitting(plan: MemoryPlan, count: int = 1) -> list[str]:
    """The usual GPUs that `count` of such processes fit at once."""
    return [name for name, gib in GPUS.items() if plan.fits(gib / count)]


def _in_words(fits: Sequence[str]) -> str:
    return f"fits a GPU of {', '.join(fits)}" if fits else f"fits none of {', '.join(GPUS)}"


def _largest(plan: MemoryPlan, count: int = 4) -> str:
    parts = sorted(plan.parts.items(), key=lambda part: -part[1])[:count]
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)


def _share(gpus: float) -> int:
    """Processes on one GPU."""
    return max(1, int(1 / gpus)) if gpus else 1
