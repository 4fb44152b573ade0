"""Station 9: the systems that are compared — teacher, student and baselines on the same noise.

Every system gets the same held-out prompts and the same ε per prompt; only `teacher_again` draws
other noise, as the independent reference. Nothing here needs Ray.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from dmd_core.families import family_of, left_out
from dmd_core.features import latent_features
from dmd_core.latents import decode_samples
from dmd_core.noise import sample_noise, stable_seed
from dmd_core.ode import make_scheduler, step_grid
from dmd_core.plain_call import (
    call_arguments,
    family_of_pipeline,
    samples_of,
    student_guidance,
    with_latents,
)
from dmd_core.student import Student
from dmd_core.teacher import load_teacher
from pipelines.config import EvaluateSection, PairsSection, StorageSection
from pipelines.device import worker_device
from pipelines.device_turns import DeviceTurns
from pipelines.local_folders import nearby
from pipelines.storage import open_store
from pipelines.teacher_source import local_teacher

TEACHER, TEACHER_AGAIN, START, STUDENT, MEAN = (
    "teacher",
    "teacher_again",
    "start",
    "student",
    "mean",
)


def few_step_name(steps: int) -> str:
    return f"teacher_{steps}"


@dataclass(frozen=True)
class SamplingPlan:
    """How each system is sampled. The teacher is run as it was for the pairs, the student at
    `student_timesteps` (None: one step at the last time)."""

    seed: int
    solver: str
    steps: int
    guidance_scale: float
    negative_prompt: str
    height: int | None
    width: int | None
    few_steps: tuple[int, ...]
    compute_dtype: str
    batch_size: int
    student_timesteps: tuple[int, ...] | None = None

    @staticmethod
    def from_sections(
        section: EvaluateSection,
        pairs: PairsSection,
        student_timesteps: tuple[int, ...] | None = None,
    ) -> "SamplingPlan":
        steps = section.teacher_steps or pairs.steps
        return SamplingPlan(
            seed=section.seed,
            solver=pairs.solver,
            steps=steps,
            guidance_scale=pairs.guidance_scale,
            negative_prompt=pairs.negative_prompt,
            height=pairs.height,
            width=pairs.width,
            few_steps=tuple(n for n in dict.fromkeys(section.few_steps) if n != steps),
            compute_dtype=pairs.compute_dtype,
            batch_size=section.batch_size,
            student_timesteps=student_timesteps,
        )

    @property
    def student_steps(self) -> int:
        return len(self.student_timesteps or (0,))

    def seeds(self, system: str, prompts: tuple[str, ...]) -> list[int]:
        """The noise seed of each row: one for all systems, another for the reference draw."""
        purpose = "evaluate again" if system == TEACHER_AGAIN else "evaluate"
        seen: Counter[str] = Counter()
        seeds = []
        for prompt in prompts:
            again = [seen[prompt]] if seen[prompt] else []  # the nth picture of a prompt
            seeds.append(stable_seed(purpose, self.seed, prompt, *again))
            seen[prompt] += 1
        return seeds

    def few(self) -> dict[str, int]:
        """The few-step baselines and their steps."""
        return {few_step_name(steps): steps for steps in self.few_steps}

    def teacher_steps(self) -> dict[str, int]:
        """Solver steps of every system that runs the teacher's solver."""
        return {TEACHER: self.steps, TEACHER_AGAIN: self.steps} | self.few()

    def systems(self, *, mean: bool, real: bool) -> list[str]:
        """All that an evaluation samples: with the `mean` picture, if there are pairs, and without
        the reference draw, if `real` pictures are the reference."""
        again = [] if real else [TEACHER_AGAIN]
        return [TEACHER, STUDENT, *again, START, *([MEAN] if mean else []), *self.few()]


@dataclass(frozen=True)
class Networks:
    """Where a worker finds the networks: a path or URL each. `mean` is (C,h,w), or None."""

    teacher: str
    student: str
    storage: StorageSection
    mean: np.ndarray | None = None
    gpus: float = 0
    threads: int | None = None

    @property
    def device(self) -> str:
        """Of the worker that asks."""
        return worker_device(self.gpus)

    def local(self) -> "Networks":
        """The same, on this machine's disk."""
        teacher = local_teacher(self.teacher, self.storage)
        student = nearby(open_store(self.student, self.storage))
        return replace(self, teacher=teacher, student=student)


@dataclass(frozen=True)
class Images:
    """One system's output. Row i belongs to prompts[i]: latents (N,C,h,w) float32, pictures
    (N,H,W,3) uint8, features (N,d) float32."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    latents: np.ndarray
    pictures: np.ndarray
    features: np.ndarray

    @staticmethod
    def cat(parts: Sequence["Images"]) -> "Images":
        """One after the other."""
        names = ("latents", "pictures", "features")
        return Images(
            tuple(prompt for part in parts for prompt in part.prompts),
            tuple(seed for part in parts for seed in part.seeds),
            *(np.concatenate([getattr(part, name) for part in parts]) for name in names),
        )

    def rows(self, chosen: slice) -> "Images":
        return Images(
            self.prompts[chosen],
            self.seeds[chosen],
            self.latents[chosen],
            self.pictures[chosen],
            self.features[chosen],
        )

    def parts(self) -> Iterator["Images"]:
        """As those that are stored are read: here, all at once."""
        yield self

    def groups(self, rows: int) -> Mapping[int, "Images"]:
        """First row → so many rows."""
        starts = range(0, len(self.prompts), rows)
        return {start: self.rows(slice(start, start + rows)) for start in starts}


def network_evaluations(
    plan: SamplingPlan, scheduler_config: dict, system: str, *, distilled: bool = False
) -> int:
    """Forward passes of the network for one picture of `system`; guidance doubles them, where the
    network is not told it (`distilled`)."""
    if system in (START, STUDENT, MEAN):
        return 0 if system == MEAN else plan.student_steps
    scheduler = make_scheduler(plan.solver, scheduler_config, image_tokens=1)  # any: steps count
    scheduler.set_timesteps(**step_grid(scheduler.config, plan.teacher_steps()[system], 1))
    return len(scheduler.timesteps) * (2 if plan.guidance_scale > 1.0 and not distilled else 1)


class SystemSampler:
    """Samples any system; works without Ray. Networks must be local folders. Teacher and student
    take turns on the device: ask for one system after the other."""

    def __init__(self, plan: SamplingPlan, networks: Networks) -> None:
        self.plan = plan
        self.teacher = load_teacher(
            networks.teacher, device=networks.device, size=(plan.height, plan.width)
        )
        self.shape = self.teacher.latent_shape(plan.height, plan.width)
        self.mean = networks.mean
        self._student_path, self._student = networks.student, None
        # All pictures become features in the teacher's VAE.
        self._turns = DeviceTurns(networks.device, self.teacher.pipeline, stays=self.teacher.vae)

    def __call__(self, system: str, prompts: tuple[str, ...], seeds: list[int]) -> Images:
        """Pictures of `system`. ε is rounded to float16, as the pairs' noise is."""
        eps = sample_noise(seeds, self.shape, torch.float16).float()
        if system == MEAN:
            latents, pictures = self._mean_picture(len(prompts))
        elif system == STUDENT:
            latents, pictures = self._sample_student(eps, prompts, seeds)
        else:
            self._turns.bring(self.teacher.pipeline)
            solved = (
                self._start(eps, prompts, seeds)
                if system == START
                else self._solve(system, eps, prompts)
            )
            latents, pictures = solved.cpu().numpy(), self.teacher.decode(solved)
        features = latent_features(self.teacher.vae, pictures)
        return Images(tuple(prompts), tuple(seeds), latents, pictures, features)

    def _solve(self, system: str, eps: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        plan = self.plan
        return self.teacher.solve(
            eps,
            prompts,
            solver=plan.solver,
            steps=plan.teacher_steps()[system],
            guidance_scale=plan.guidance_scale,
            negative_prompt=plan.negative_prompt,
            compute_dtype=getattr(torch, plan.compute_dtype),
        )

    @torch.no_grad()
    def _start(self, eps: torch.Tensor, prompts: tuple[str, ...], seeds: list[int]) -> torch.Tensor:
        """The student before training: the teacher's network, called as the student calls it."""
        last = self.teacher.schedule.num_timesteps - 1
        student = Student(self.teacher.denoiser(), self.plan.student_timesteps or (last,))
        again = [
            sample_noise([stable_seed("start", seed, step) for seed in seeds], self.shape)
            for step in range(1, len(student.timesteps))
        ]
        noises = [noise.to(self.teacher.device) for noise in (eps, *again)]
        return student.sample(noises, self.teacher.encode_prompts(prompts))

    @torch.no_grad()
    def _sample_student(
        self, eps: torch.Tensor, prompts: tuple[str, ...], seeds: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The exported folder through plain diffusers, as its user would call it. A student of
        several steps draws its re-noising from one generator per picture."""
        if self._student is None:
            self._student = load_plainly(self._student_path, "cpu")
        self._turns.bring(self._student)
        pipeline, family = with_latents(self._student), family_of_pipeline(self._student)
        arguments = call_arguments(
            family_of_pipeline(pipeline),
            prompts,
            self.teacher.encode_prompts(prompts).labels if family.on_pixels else None,
            eps.to(self.teacher.device),
            self.teacher.size,
        )
        if family.takes("guidance_scale"):
            arguments["guidance_scale"] = student_guidance(family)
        with _seeded(self.teacher.device, seeds):
            latents = samples_of(
                family_of_pipeline(pipeline),
                pipeline,
                eps.shape,
                num_inference_steps=self.plan.student_steps,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                **arguments,
            )
        vae = getattr(pipeline, "vae", None)
        return latents.float().cpu().numpy(), decode_samples(vae, latents)

    def _mean_picture(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The same picture for every prompt: the mean of the training latents, decoded once."""
        if self.mean is None or self.mean.shape != self.shape:
            found = None if self.mean is None else self.mean.shape
            raise ValueError(f"mean latent has shape {found}; expected {self.shape}")
        mean = self.mean[None].astype(np.float32)
        picture = self.teacher.decode(torch.from_numpy(mean))
        return mean.repeat(count, axis=0), picture.repeat(count, axis=0)


@contextmanager
def _seeded(device: torch.device, seeds: list[int]) -> Iterator[None]:
    """Pipelines of flow models re-noise from torch's own generator, whatever they are given."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(stable_seed("student again", *seeds))
        yield


def load_plainly(path: str, device: str | torch.device) -> Any:
    """A pipeline folder by plain diffusers, nothing of ours: what its user would have."""
    pipeline = DiffusionPipeline.from_pretrained(
        path,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        **left_out(path, family_of(path)),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
