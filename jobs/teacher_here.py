"""The teacher on the machine that plans: what one pair takes, where nothing else tells it."""

import time
from functools import cached_property
from math import prod

import numpy as np
import torch

from dmd_core.noise import sample_noise
from dmd_core.teacher import Teacher, load_teacher
from jobs.config import resolve_shipped
from jobs.session import Session
from pipelines.config import PairsSection
from pipelines.costs import Rate, evaluations_per_picture
from pipelines.prompt_files import PromptError, PromptSource, list_files, read_rows


class TeacherHere:
    """Loaded only if something is asked of it."""

    def __init__(self, session: Session, section: PairsSection | None = None) -> None:
        """`section`: where it is not the recipe's own."""
        self._session, self._section = session, section or session.recipe.pairs
        self._on_gpu = self._section.gpus_per_actor > 0

    @cached_property
    def teacher(self) -> Teacher:
        device = "cuda" if self._on_gpu and torch.cuda.is_available() else "cpu"
        return load_teacher(self._session.teacher_dir, device=device)

    def pair_bytes(self) -> int:
        """Of one pair's tensors."""
        shape = self.teacher.latent_shape(self._section.height, self._section.width)
        return 2 * np.dtype(self._section.dtype).itemsize * prod(shape)

    def rate(self) -> Rate:
        """Seconds per pair, from one network evaluation of a batch."""
        section = self._section
        if self._on_gpu and not torch.cuda.is_available():
            return Rate(
                None,
                "unknown: teachers are to work on GPUs, and this machine has none to measure on; "
                "cost.seconds_per_picture states it",
            )
        seconds = self._seconds_per_evaluation() * evaluations_per_picture(section)
        return Rate(
            seconds,
            f"{seconds:.3g} s per pair, measured here: one network evaluation of a batch of "
            f"{section.batch_size} on this machine's {'GPU' if self._on_gpu else 'CPU'}",
        )

    @torch.no_grad()
    def _seconds_per_evaluation(self) -> float:
        """Per picture of a full batch; a first evaluation warms up."""
        section, teacher, taken = self._section, self.teacher, 0.0
        shape, count = teacher.latent_shape(section.height, section.width), section.batch_size
        eps = sample_noise(range(count), shape).to(teacher.device)
        cond = teacher.encode_prompts([first_prompt(self._session)] * count)
        t = torch.full((count,), teacher.schedule.num_timesteps - 1, device=teacher.device)
        network = teacher.network(getattr(torch, section.compute_dtype))
        for _ in range(2):
            started = time.perf_counter()
            network(eps, t, cond).cpu()
            taken = time.perf_counter() - started
        return taken / count


def pair_source(section: PairsSection) -> PromptSource:
    files = (section.prompts,) if isinstance(section.prompts, str) else section.prompts
    return PromptSource(tuple(map(resolve_shipped, files)), section.prompt_column)


def first_prompt(session: Session) -> str:
    """Of the recipe's list; for a class-conditional teacher it names a class."""
    section = session.recipe.pairs
    files = list_files(pair_source(section), session.recipe.storage)
    for file in files:
        for row in read_rows(file, section.prompt_column):
            return row.prompt
    raise PromptError(f"{', '.join(file.name for file in files)}: no prompts in them")
