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
from pipelines.ledger import data_base
from pipelines.pairs import Fingerprint, encode_pairs
from pipelines.prompts import LandedFile, LandedPrompts
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


def negative_prompt(pair_id: int) -> str | None:
    """Every fourth pair has one of its own."""
    return None if pair_id % 4 else f"not {pair_id}"


def made_batch(ids: Sequence[int], dtype: torch.dtype = torch.float16) -> PairBatch:
    """Pairs whose tensors follow from their ids, so that any mix-up shows."""
    noise, latents = sample_noise(ids, SHAPE, dtype), sample_noise([i + 1 for i in ids], SHAPE)
    return PairBatch(tuple(ids), tuple(f"prompt {i}" for i in ids), noise, latents.to(dtype))


def made_table(ids: Sequence[int], fingerprint: Fingerprint = FINGERPRINT):
    return encode_pairs(
        made_batch(ids),
        list(ids),
        negative_prompts=[negative_prompt(i) for i in ids],
        fingerprint=fingerprint,
        provenance={"a": "1"},
    )


def write_file(
    root: Store,
    name: str,
    ids: Sequence[int],
    *,
    row_group_rows: int = 4,
    fingerprint: Fingerprint = FINGERPRINT,
    finished: bool = True,
) -> str:
    """One data file `<base>-<number>.parquet` of the generation; returns its path.

    `finished`: with the ledger entry that says so, as Ray Data writes it after the data.
    """
    path = root.path(fingerprint.folder, "data", name)
    write_atomic(root.fs, path, _to_parquet(made_table(ids, fingerprint), row_group_rows))
    if finished:
        entry = root.path(fingerprint.folder, "ledger", f"{data_base(name)}.parquet")
        ledger = pa.table({"pair_id": pa.array(ids, pa.int64())})
        write_atomic(root.fs, entry, _to_parquet(ledger))
    return path


def land_ids(root: Store, ids: Sequence[int]) -> LandedPrompts:
    """A landed table that asks for exactly the pairs `ids`."""
    ids = sorted(ids)
    columns = {
        "pair_id": pa.array(ids, pa.int64()),
        "prompt": pa.array([f"prompt {i}" for i in ids], pa.string()),
        "seed": pa.array(ids, pa.int64()),
        "negative_prompt": pa.array([negative_prompt(i) for i in ids], pa.string()),
    }
    content = _to_parquet(pa.table(columns))
    digest = hashlib.sha256(content).hexdigest()
    path = root.path("prompts", f"{digest}.parquet")
    write_atomic(root.fs, path, content)
    return LandedPrompts((LandedFile(path, len(ids), None, None),), len(ids), digest, 0)


def _to_parquet(table: pa.Table, row_group_rows: int | None = None) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=row_group_rows, write_page_checksum=True)
    return buffer.getvalue()
