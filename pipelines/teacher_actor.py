"""Stations 2–4 inside one worker: seeds → noise → teacher ODE → rows, and the reject lane."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
import ray
import torch

from dmd_core.compilation import compile_network
from dmd_core.noise import sample_noise
from dmd_core.teacher import Teacher, TeacherError, all_weights, load_teacher
from dmd_core.teacher_files import file_states, overwritten
from dmd_core.types import PairBatch
from pipelines.computing import prepare_computing
from pipelines.config import PairsSection, StorageSection
from pipelines.device import device_named, worker_device
from pipelines.pairs import Fingerprint, encode_pairs
from pipelines.progress import DeviceFault
from pipelines.rejects import RejectedRow, write_rejects
from pipelines.row_solver import DeviceFaultError, RowSolver, Suspicion
from pipelines.storage import Store
from pipelines.teacher_source import local_teacher

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherTask:
    """All that a worker needs to make pairs: plain values, sent once per worker.

    `height` and `width` (pixels) are those of the prompt file; None: the section's, and if that
    says nothing, the teacher's own. `fence` is the number of the run's lease; a machine has as many
    as `workers` of them.
    """

    section: PairsSection
    teacher_url: str
    storage: StorageSection
    root: Store
    fingerprint: Fingerprint
    provenance: dict[str, str]
    height: int | None = None
    width: int | None = None
    board: Any = None
    fence: int = 0
    workers: int = 1


class TeacherActor:
    """The teacher, loaded once; called with landed rows, returns rows of pairs.

    A landed row is (pair_id, prompt, seed) and may have a negative_prompt; null: the section's.

    A process whose device is lost says on the board which rows it had, and ends: Ray starts the
    actor again and repeats its blocks.
    """

    def __init__(self, task: TeacherTask) -> None:
        section = task.section
        prepare_computing(1)  # see `prepare_computing`
        folder = local_teacher(task.teacher_url, task.storage)
        self._files = file_states(all_weights(folder))
        with device_named():
            self._teacher = load_teacher(
                folder,
                device=worker_device(section.gpus_per_actor),
                compute_dtype=getattr(torch, section.compute_dtype),
            )
        if self._teacher.revision != task.fingerprint.teacher_revision:
            raise TeacherError(
                f"teacher {task.teacher_url} is now {self._teacher.revision[:16]}; "
                f"expected {task.fingerprint.teacher_revision[:16]} (it changed during the run)"
            )
        if section.compile:
            compile_network(self._teacher.model, self._teacher.device)
        self._task, self._section = task, section
        self._dtype: torch.dtype = getattr(torch, section.dtype)
        self._shape = self._teacher.latent_shape(
            task.height or section.height, task.width or section.width
        )
        self._solver = RowSolver(
            self._solve,
            batch_size=section.batch_size,
            attempts=section.attempts,
            dtype=self._dtype,
            probe=_probe(self._teacher),
        )
        self._device_faults: list[DeviceFault] = []
        if task.board is not None:
            self._device_faults = ray.get(task.board.device_faults.remote())
        self._unchecked = bool(self._device_faults)

    def __call__(self, rows: pa.Table) -> pa.Table:
        prepare_computing(self._section.threads_per_actor, self._task.workers)
        ids, prompts = rows["pair_id"].to_pylist(), rows["prompt"].to_pylist()
        seeds = rows["seed"].to_pylist()
        negatives: list[str | None] = [None] * len(ids)
        if "negative_prompt" in rows.column_names:
            negatives = rows["negative_prompt"].to_pylist()
        noise = sample_noise(seeds, self._shape, self._dtype)
        started = time.perf_counter()
        if self._unchecked and ids:
            self._solver.check_device(noise[:1])
            self._unchecked = False
        try:
            solved = self._solver(noise, prompts, negatives, self._suspicions(ids))
        except DeviceFaultError as error:
            self._end_process(DeviceFault(tuple(ids[row] for row in error.rows), str(error)))
        busy = time.perf_counter() - started
        if changed := overwritten(self._files):
            raise TeacherError(
                f"teacher {self._task.teacher_url} changed during the run: {changed[0]} was "
                "written to. What was made before that is kept; run the same command again"
            )
        if solved.faults:
            rejected = [
                RejectedRow(ids[fault.index], prompts[fault.index], fault.reason, fault.attempts)
                for fault in solved.faults
            ]
            folder = self._task.fingerprint.folder
            write_rejects(self._task.root, folder, rejected, fence=self._task.fence)
        kept = list(solved.kept)
        batch = PairBatch(
            tuple(ids[i] for i in kept),
            tuple(prompts[i] for i in kept),
            noise[kept],
            solved.latents,
        )
        table = encode_pairs(
            batch,
            [seeds[i] for i in kept],
            negative_prompts=[negatives[i] for i in kept],
            fingerprint=self._task.fingerprint,
            provenance=self._task.provenance,
        )
        if self._task.board is not None:
            self._task.board.advance.remote(len(ids), rejected=len(solved.faults), busy_s=busy)
        return table

    def _suspicions(self, ids: Sequence[int]) -> Mapping[int, Suspicion]:
        """Of the rows `ids`, by index: what processes that lost their device said of them."""
        found: dict[int, Suspicion] = {}
        where = {pair_id: row for row, pair_id in enumerate(ids)}
        for fault in self._device_faults:
            alone = len(fault.pair_ids) == 1
            for row in (where[pair_id] for pair_id in fault.pair_ids if pair_id in where):
                before = found.get(row, Suspicion(0, 0, ""))
                found[row] = Suspicion(
                    before.shared + (not alone), before.alone + alone, fault.reason
                )
        return found

    def _end_process(self, fault: DeviceFault) -> NoReturn:
        _logger.error("the device is lost to this process: %s", fault.reason)
        if self._task.board is None:
            raise TeacherError(f"the device is lost: {fault.reason}")
        ray.get(self._task.board.note_device_fault.remote(fault))
        os._exit(1)  # an orderly exit would be no reason for Ray to start the actor again

    def _solve(
        self, eps: torch.Tensor, prompts: Sequence[str], negatives: Sequence[str | None]
    ) -> torch.Tensor:
        section = self._section
        return self._teacher.solve(
            eps,
            prompts,
            solver=section.solver,
            steps=section.steps,
            guidance_scale=section.guidance_scale,
            negative_prompt=[
                section.negative_prompt if text is None else text for text in negatives
            ],
        )


def _probe(teacher: Teacher) -> str:
    """A prompt that the teacher takes if it takes any: a class-conditional one may know no "no
    class", which the empty prompt stands for; every text encoder takes that."""
    on_pixels, pipeline = teacher.family.on_pixels, teacher.pipeline
    return "0" if on_pixels and pipeline.unet.config.num_class_embeds is not None else ""
