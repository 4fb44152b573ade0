"""Pairs made by hand, without a teacher: for tests of what comes after one."""

import hashlib
import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dmd_core.files import write_atomic
from dmd_core.noise import sample_noise
from dmd_core.types import PairBatch
from pipelines.pairs import Fingerprint, encode_pairs
from pipelines.prompts import LandedPrompts
from pipelines.storage import Store

SHAPE = (2, 3, 4)
FINGERPRINT = Fingerprint(
    teacher_revision="a" * 64,
    solver="ddim",
    steps=5,
    guidance_scale=7.5,
    negative_prompt="",
    height=None,
    width=None,
    dtype="float16",
    compute_dtype="float32",
    seed=0,
)


def made_batch(ids: Sequence[int], dtype: torch.dtype = torch.float16) -> PairBatch:
    """Pairs whose tensors follow from their ids, so that any mix-up shows."""
    noise, latents = sample_noise(ids, SHAPE, dtype), sample_noise([i + 1 for i in ids], SHAPE)
    return PairBatch(tuple(ids), tuple(f"prompt {i}" for i in ids), noise, latents.to(dtype))


def made_table(ids: Sequence[int], fingerprint: Fingerprint = FINGERPRINT):
    return encode_pairs(made_batch(ids), list(ids), fingerprint=fingerprint, provenance={"a": "1"})


def write_file(
    root: Store,
    name: str,
    ids: Sequence[int],
    *,
    row_group_rows: int = 4,
    fingerprint: Fingerprint = FINGERPRINT,
) -> str:
    """One data file of the generation; returns its path."""
    buffer = io.BytesIO()
    pq.write_table(made_table(ids, fingerprint), buffer, row_group_size=row_group_rows)
    path = root.path(fingerprint.folder, "data", name)
    write_atomic(root.fs, path, buffer.getvalue())
    return path


def land_ids(root: Store, ids: Sequence[int]) -> LandedPrompts:
    """A landed table that asks for exactly `ids`."""
    table = pa.table({"pair_id": pa.array(sorted(ids), pa.int64())})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    path = root.path("prompts", f"{digest}.parquet")
    write_atomic(root.fs, path, buffer.getvalue())
    return LandedPrompts(path, len(ids), digest, 0)
