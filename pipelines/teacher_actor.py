"""Stations 2–4 inside one worker: seeds → noise → teacher ODE → rows, and the reject lane."""

import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from dmd_core.files import write_atomic
from dmd_core.noise import sample_noise
from dmd_core.teacher import TeacherError, load_teacher
from dmd_core.types import PairBatch
from pipelines.config import PairsSection, StorageSection
from pipelines.pairs import Fingerprint, encode_pairs
from pipelines.storage import Store, local_copy, open_store
from pipelines.workers import set_threads


@contextmanager
def teacher_folder(url: str, storage: StorageSection | None = None) -> Iterator[str]:
    """The teacher at `url` as a local path, for the length of the block."""
    store = open_store(url, storage)
    path = local_copy(store)
    try:
        yield path
    finally:
        if path != store.root:
            shutil.rmtree(path)


@dataclass(frozen=True)
class TeacherTask:
    """All that a worker needs to make pairs: plain values, sent once per worker."""

    section: PairsSection
    teacher_url: str
    storage: StorageSection
    root: Store
    fingerprint: Fingerprint
    provenance: dict[str, str]
    board: Any = None


class TeacherActor:
    """The teacher, loaded once; called with rows (pair_id, prompt, seed), returns rows of pairs."""

    def __init__(self, task: TeacherTask) -> None:
        section = task.section
        set_threads(section.threads_per_actor)
        device = "cuda" if section.gpus_per_actor and torch.cuda.is_available() else "cpu"
        with teacher_folder(task.teacher_url, task.storage) as path:
            self._teacher = load_teacher(path, device=device)
        if self._teacher.revision != task.fingerprint.teacher_revision:
            raise TeacherError(
                f"teacher {task.teacher_url} is now {self._teacher.revision[:16]}; "
                f"expected {task.fingerprint.teacher_revision[:16]} (it changed during the run)"
            )
        self._task, self._section = task, section
        self._dtype: torch.dtype = getattr(torch, section.dtype)
        self._shape = self._teacher.latent_shape(section.height, section.width)

    def __call__(self, rows: pa.Table) -> pa.Table:
        ids, prompts = rows["pair_id"].to_pylist(), rows["prompt"].to_pylist()
        seeds = rows["seed"].to_pylist()
        noise = sample_noise(seeds, self._shape, self._dtype)
        latents = self._solve(noise, prompts).to(self._dtype)
        # After rounding: a latent beyond 65504 is finite in float32 and not in float16.
        usable = latents.isfinite().flatten(1).all(1)
        if not bool(usable.all()):
            bad = (~usable).nonzero().flatten().tolist()
            self._reject([(ids[i], prompts[i]) for i in bad])
        good = usable.nonzero().flatten().tolist()
        batch = PairBatch(
            tuple(ids[i] for i in good),
            tuple(prompts[i] for i in good),
            noise[good],
            latents[good],
        )
        table = encode_pairs(
            batch,
            [seeds[i] for i in good],
            fingerprint=self._task.fingerprint,
            provenance=self._task.provenance,
        )
        if self._task.board is not None:
            self._task.board.advance.remote(len(ids))
        return table

    def _solve(self, noise: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Latents (B,C,h,w) float32 on the CPU. A short batch is filled up: one shape for all."""
        padding = max(0, self._section.batch_size - len(noise))
        eps = torch.cat([noise, noise[:1].expand(padding, *noise.shape[1:])])
        latents = self._teacher.solve(
            eps,
            [*prompts, *[prompts[0]] * padding],
            solver=self._section.solver,
            steps=self._section.steps,
            guidance_scale=self._section.guidance_scale,
            negative_prompt=self._section.negative_prompt,
            compute_dtype=getattr(torch, self._section.compute_dtype),
        )
        return latents[: len(noise)].cpu()

    def _reject(self, rows: Sequence[tuple[int, str]]) -> None:
        """Written rows are never made again; these are not written, so the next run tries them."""
        reason = f"the latents are not finite in {self._section.dtype}"
        lines = [
            json.dumps({"pair_id": pair_id, "prompt": prompt, "reason": reason}) + "\n"
            for pair_id, prompt in rows
        ]
        folder = self._task.root.path(self._task.fingerprint.folder, "rejects")
        path = f"{folder}/{uuid.uuid4().hex}.jsonl"
        write_atomic(self._task.root.fs, path, "".join(lines).encode())
