"""Does the teacher still give what is stored? Random rows are made again and compared."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dmd_core.noise import sample_noise
from dmd_core.teacher import Teacher, TeacherError
from pipelines.manifest_model import Manifest
from pipelines.pairs import numerics_version
from pipelines.storage import Store
from pipelines.stored_rows import StoredRow, random_rows, read_rows

# The largest difference that is no change, in standard deviations of the latents. Kernels sum in an
# order that depends on batch size, device and library, and the sampler carries that on. Measured on
# the shipped teacher: another batch size 3e-6, other kernels 8e-6, and bfloat16 instead of float32
# 0.014; TF32, which a GPU may use for float32, rounds 8 times finer than bfloat16. One sampler step
# more changes every row by 0.009 at least, another guidance scale (2.6 for 2.5) by 0.03. So float32
# shows all of these; bfloat16 shows another prompt, teacher or seed, and not one step more.
TOLERANCE = {"float32": 0.005, "bfloat16": 0.05}


@dataclass(frozen=True)
class VerifyReport:
    """`seed` drew the rows. Differences |new − stored| are in standard deviations of the latents.

    `latents_differ`: ids of rows with a difference beyond `tolerance` and the stored dtype's
    rounding; `noise_differs`: ids whose stored noise is not, bit for bit, that of their seed.
    """

    version: int
    rows: int
    seed: int
    tolerance: float
    latent_std: float
    max_difference: float
    mean_difference: float
    latents_differ: tuple[int, ...]
    noise_differs: tuple[int, ...]

    @property
    def ok(self) -> bool:
        return not (self.latents_differ or self.noise_differs)


def check_revision(manifest: Manifest, revision: str) -> None:
    """Raises `TeacherError` unless `revision` is the teacher that made the version."""
    needed = manifest.fingerprint["teacher_revision"]
    if revision != needed:
        raise TeacherError(
            f"version {manifest.version} was made by the teacher of revision {needed}, but the "
            f"configured one is {revision}; give that teacher's folder with "
            "--set teacher.path=…"
        )


def verify_rows(
    root: Store,
    manifest: Manifest,
    teacher: Teacher,
    *,
    count: int,
    seed: int,
    batch_size: int,
    tolerance: float | None = None,
) -> VerifyReport:
    """Make `count` random rows of the version again, as its fingerprint says, and compare.

    Size and sha256 of the files they lie in are compared first (`PairFileError`). `batch_size` is
    the number of rows that the teacher sees at once: short batches are filled up, as when the
    pairs were made.
    """
    fingerprint = manifest.fingerprint
    check_revision(manifest, teacher.revision)
    ours = numerics_version(fingerprint["compute_dtype"])
    if fingerprint["numerics_version"] != ours:
        raise TeacherError(
            f"version {manifest.version} was made by numerics_version "
            f"{fingerprint['numerics_version']}; this program has {ours} and would make other "
            "pairs"
        )
    if tolerance is None:
        tolerance = TOLERANCE[fingerprint["compute_dtype"]]
    rows = read_rows(root, manifest, random_rows(manifest, count, seed), verify=True)
    std = _latent_std(manifest, rows)
    noise_differs, latents_differ, largest, means = [], [], [], []
    for part in _alike(rows, batch_size):
        noise = sample_noise([row.seed for row in part], part[0].noise.shape, part[0].noise.dtype)
        latents = _solve(teacher, manifest, noise, part, batch_size)
        for row, eps, latent in zip(part, noise, latents, strict=True):
            if not torch.equal(eps, row.noise):
                noise_differs.append(row.pair_id)
            difference = (latent - row.latent.float()).abs()
            # The stored value was rounded by half of this at most; the half left over is slack.
            rounding = torch.finfo(row.latent.dtype).eps * row.latent.float().abs()
            if not bool((difference <= tolerance * std + rounding).all()):  # also: not finite
                latents_differ.append(row.pair_id)
            largest.append(float(difference.max()) / std)
            means.append(float(difference.mean()) / std)
    return VerifyReport(
        version=manifest.version,
        rows=len(rows),
        seed=seed,
        tolerance=tolerance,
        latent_std=std,
        max_difference=float(np.max(largest)),
        mean_difference=float(np.mean(means)),
        latents_differ=tuple(sorted(latents_differ)),
        noise_differs=tuple(sorted(noise_differs)),
    )


def _latent_std(manifest: Manifest, rows: Sequence[StoredRow]) -> float:
    """Of the version; of these rows where its statistics are not kept."""
    known = manifest.statistics.get("latent_std")
    found = known or float(torch.cat([row.latent.double().flatten() for row in rows]).std())
    return found or 1.0


def _alike(rows: Sequence[StoredRow], batch_size: int) -> Iterator[list[StoredRow]]:
    """Batches of rows with one shape."""
    groups: dict[torch.Size, list[StoredRow]] = {}
    for row in rows:
        groups.setdefault(row.noise.shape, []).append(row)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _solve(
    teacher: Teacher,
    manifest: Manifest,
    noise: torch.Tensor,
    rows: Sequence[StoredRow],
    batch_size: int,
) -> torch.Tensor:
    """Latents (B,C,h,w) float32 on the CPU, not rounded."""
    fingerprint = manifest.fingerprint
    places = [*range(len(rows)), *[0] * (batch_size - len(rows))]
    default = fingerprint["negative_prompt"]
    negatives = [default if row.negative_prompt is None else row.negative_prompt for row in rows]
    latents = teacher.solve(
        noise[places],
        [rows[place].prompt for place in places],
        solver=fingerprint["solver"],
        steps=fingerprint["steps"],
        guidance_scale=fingerprint["guidance_scale"],
        negative_prompt=[negatives[place] for place in places],
        compute_dtype=getattr(torch, fingerprint["compute_dtype"]),
    )
    return latents[: len(rows)].cpu()
