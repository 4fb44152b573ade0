"""The teacher on the machine that plans: what one pair takes, where nothing else tells it."""

import time
from collections.abc import Mapping
from functools import cached_property
from math import lcm, prod

import numpy as np
import torch

from dmd_core.families import folder_geometry, guidance_distilled
from dmd_core.noise import sample_noise
from dmd_core.teacher import Teacher, TeacherError, load_teacher
from jobs.config import resolve_shipped
from jobs.session import Session
from pipelines.config import PairsSection
from pipelines.costs import Rate, evaluations_per_picture
from pipelines.prompt_files import PromptError, PromptSource, list_files, read_rows
from pipelines.prompt_rows import SIDE_STEP


class TeacherHere:
    """Loaded only if something is asked of it."""

    def __init__(self, session: Session, section: PairsSection | None = None) -> None:
        """`section`: where it is not the recipe's own."""
        self._session, self._section = session, section or session.recipe.pairs
        self._on_gpu = self._section.gpus_per_actor > 0

    @cached_property
    def teacher(self) -> Teacher:
        device = "cuda" if self._on_gpu and torch.cuda.is_available() else "cpu"
        compute_dtype = getattr(torch, self._section.compute_dtype)
        return load_teacher(self._session.teacher_dir, device=device, compute_dtype=compute_dtype)

    @property
    def distilled(self) -> bool:
        """Is guidance an input of the network, instead of a second pass?"""
        return guidance_distilled(self._session.teacher_dir)

    def evaluations(self) -> int:
        """Of the network, for one pair."""
        return evaluations_per_picture(self._section, distilled=self.distilled)

    def shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(C,h,w) of a row's sample; None: the recipe's size. No weights are loaded for it. Raises
        `TeacherError` for a size that the teacher cannot make."""
        height, width = height or self._section.height, width or self._section.width
        try:
            return folder_geometry(self._session.teacher_dir).shape(height, width)
        except ValueError as error:
            raise TeacherError(str(error)) from error

    def pair_bytes(self, sizes: Mapping[tuple[int | None, int | None], int]) -> int:
        """Of the tensors of so many pairs of each (height, width)."""
        values = sum(count * prod(self.shape(*size)) for size, count in sizes.items())
        return 2 * np.dtype(self._section.dtype).itemsize * values

    def mean_area(self, sizes: Mapping[tuple[int | None, int | None], int]) -> float:
        """Of so many rows of each (height, width), relative to one of the recipe's size."""
        area = sum(count * prod(self.shape(*size)[1:]) for size, count in sizes.items())
        return area / prod(self.shape()[1:]) / max(1, sum(sizes.values()))

    def rate(self) -> Rate:
        """Seconds per pair, from one network evaluation of a batch."""
        section = self._section
        if self._on_gpu and not torch.cuda.is_available():
            return Rate(
                None,
                "unknown: teachers are to work on GPUs, and this machine has none to measure on; "
                "cost.seconds_per_picture states it",
            )
        seconds = self._seconds_per_evaluation() * self.evaluations()
        return Rate(
            seconds,
            f"{seconds:.3g} s per pair, measured here: one network evaluation of a batch of "
            f"{section.batch_size} on this machine's {'GPU' if self._on_gpu else 'CPU'}",
        )

    @torch.no_grad()
    def _seconds_per_evaluation(self) -> float:
        """Per picture of a full batch; a first evaluation warms up."""
        section, teacher, taken = self._section, self.teacher, 0.0
        count = section.batch_size
        eps = sample_noise(range(count), self.shape()).to(teacher.device)
        try:
            cond = teacher.encode_prompts([first_prompt(self._session)] * count)
        except IndexError as error:  # of `dmd pairs` itself it would be one row's fault
            raise PromptError(f"the first prompt of pairs.prompts: {error}") from error
        t = torch.full((count,), teacher.schedule.num_timesteps - 1, device=teacher.device)
        network = teacher.network()
        for _ in range(2):
            started = time.perf_counter()
            network(eps, t, cond).cpu()
            taken = time.perf_counter() - started
        return taken / count


def pair_source(section: PairsSection, teacher_dir: str | None = None) -> PromptSource:
    """Where the prompts of pairs come from; with `teacher_dir`, their sizes must be ones that this
    teacher can make."""
    files = (section.prompts,) if isinstance(section.prompts, str) else section.prompts
    step = lcm(SIDE_STEP, folder_geometry(teacher_dir).step) if teacher_dir else SIDE_STEP
    return PromptSource(tuple(map(resolve_shipped, files)), section.prompt_column, step)


def first_prompt(session: Session) -> str:
    """Of the recipe's list; for a class-conditional teacher it names a class."""
    section = session.recipe.pairs
    files = list_files(pair_source(section), session.recipe.storage)
    for file in files:
        for row in read_rows(file, section.prompt_column):
            return row.prompt
    raise PromptError(f"{', '.join(file.name for file in files)}: no prompts in them")
