"""Pictures to look at while a run trains: the teacher's above, the student's below, on the same
noise and prompts throughout the run."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from dmd_core.condition import Condition
from dmd_core.noise import sample_noise, stable_seed
from dmd_core.student import Student
from dmd_core.teacher import Teacher
from pipelines.config import PairsSection
from pipelines.following import PairVersions

_PROMPTS = "prompts of the sample pictures"
Shown = tuple[torch.Tensor, Condition, torch.Tensor]


class SamplePictures:
    """Of the first stored pairs; of the first `prompts` where the run reads no pairs."""

    def __init__(
        self,
        teacher: Teacher,
        section: PairsSection,
        versions: PairVersions,
        prompts: Sequence[str],
        *,
        count: int,
        seed: int,
        at_once: int,
    ) -> None:
        """`at_once`: samples of a pass; the same on all workers, who call sharded networks
        together."""
        self._teacher, self._section, self._versions = teacher, section, versions
        self._prompts, self._count, self._seed = tuple(prompts[:count]), count, seed
        self._at_once = at_once

    def prepare(self) -> None:
        """Read and encode what is shown, before another thread draws the first step's data: neither
        a tokenizer nor an open file is made for two threads."""
        _ = self._shown

    def rows(self, student: Student) -> list[np.ndarray]:
        """[the teacher's, the student's], each (N,H,W,3) uint8."""
        eps, cond, latents = self._shown
        x = torch.cat(
            [
                self._sample(student, eps[piece], cond.rows(piece), piece)
                for piece in self._pieces(len(eps))
            ]
        )
        return [self._teacher.decode(latents), self._teacher.decode(x)]

    def _sample(
        self, student: Student, eps: torch.Tensor, cond: Condition, rows: slice
    ) -> torch.Tensor:
        device, shape = self._teacher.device, tuple(eps.shape[1:])
        seeds = [
            stable_seed(self._seed, "samples", index) for index in range(rows.start, rows.stop)
        ]
        again = [
            sample_noise([stable_seed(seed, "again", step) for seed in seeds], shape)
            for step in range(1, len(student.timesteps))
        ]
        noises = [noise.to(device) for noise in (eps, *again)]
        return student.sample(noises, cond)

    def _pieces(self, rows: int) -> list[slice]:
        starts = range(0, rows, self._at_once)
        return [slice(start, min(start + self._at_once, rows)) for start in starts]

    @cached_property
    def _shown(self) -> Shown:
        """(ε, the prompts' condition, the teacher's latents)."""
        if self._versions.segments:
            batch = self._versions.first().batch(0, self._count)
            return batch.noise.float(), self._encoded(batch.prompts), batch.latents
        section, count = self._section, len(self._prompts)
        seeds = [stable_seed(self._seed, _PROMPTS, index) for index in range(count)]
        shape = self._teacher.latent_shape(section.height, section.width)
        eps = sample_noise(seeds, shape)
        latents = [self._solve(eps[rows], self._prompts[rows]) for rows in self._pieces(count)]
        return eps, self._encoded(self._prompts), torch.cat(latents)

    def _encoded(self, prompts: tuple[str, ...]) -> Condition:
        pieces = self._pieces(len(prompts))
        return Condition.cat(*(self._teacher.encode_prompts(prompts[piece]) for piece in pieces))

    def _solve(self, eps: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        section = self._section
        return self._teacher.solve(
            eps, prompts,
            solver=section.solver, steps=section.steps,
            guidance_scale=section.guidance_scale, negative_prompt=section.negative_prompt,
            compute_dtype=getattr(torch, section.compute_dtype),
        ).cpu()  # fmt: skip
