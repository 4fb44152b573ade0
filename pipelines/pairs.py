"""Station 4: a pair ↔ one Parquet row. The row contract of the data set.

Tensors are raw little-endian bytes of fixed size; shape and dtype stand in the column's metadata,
and what made the file in the file's. Every value is there, but for the negative prompt: null is the
fingerprint's. Any pyarrow reads the rows, without this project:

    import json, numpy as np, pyarrow.parquet as pq
    table = pq.read_table("pairs.parquet")
    for name in ("noise", "latent"):
        about, raw = table.schema.field(name).metadata, b"".join(table[name].to_pylist())
        array = np.frombuffer(raw, about[b"dtype"].decode())
        print(name, array.reshape(-1, *json.loads(about[b"shape"])).std(axis=0))
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from dmd_core.types import PairBatch
from pipelines.config import PairsSection
from pipelines.manifest_model import canonical_digest, generation_folder

# Raised by hand when a change of the code changes the numbers that a fingerprint stands for.
NUMERICS_VERSION = 1
_NUMERICS_OF = {"bfloat16": 2}  # of other precisions than float32. 2: text encoders compute in it
ROW_SCHEMA_VERSION = 2  # of a row; manifests have their own
TENSORS = ("noise", "latent")
_NEGATIVE_PROMPT = "negative_prompt"
_DTYPES = {torch.float16: "float16", torch.float32: "float32"}


class PairSchemaError(ValueError):
    """A table that is not a table of pairs."""


class PairFacts(NamedTuple):
    """The numbers of a table: ids (n,) int64, `noise` and `latents` (n, C·h·w) as stored."""

    pair_ids: np.ndarray
    noise: np.ndarray
    latents: np.ndarray


@dataclass(frozen=True)
class Fingerprint:
    """What made the pairs: two pairs with the same id and fingerprint are the same pair.

    `height` and `width` in pixels; None is the teacher's own size, which its revision fixes.
    """

    teacher_revision: str
    solver: str
    steps: int
    guidance_scale: float
    negative_prompt: str
    height: int | None
    width: int | None
    dtype: str
    compute_dtype: str
    seed: int
    numerics_version: int = NUMERICS_VERSION

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: 64 hex characters."""
        return canonical_digest(self.as_dict())

    @property
    def folder(self) -> str:
        """The generation's folder, relative to the data set's root."""
        return generation_folder(self.digest)


def numerics_version(compute_dtype: str) -> int:
    """Of the pairs that this program makes."""
    return _NUMERICS_OF.get(compute_dtype, NUMERICS_VERSION)


def fingerprint_of(section: PairsSection, teacher_revision: str) -> Fingerprint:
    """The fingerprint of the pairs that `section` asks for."""
    return Fingerprint(
        teacher_revision=teacher_revision,
        solver=section.solver,
        steps=section.steps,
        guidance_scale=float(section.guidance_scale),
        negative_prompt=section.negative_prompt,
        height=section.height,
        width=section.width,
        dtype=section.dtype,
        compute_dtype=section.compute_dtype,
        seed=section.seed,
        numerics_version=numerics_version(section.compute_dtype),
    )


def library_versions() -> dict[str, str]:
    """Provenance: recorded beside the fingerprint, and no part of it."""
    names = ("one-step-dmd", "torch", "diffusers", "transformers", "ray", "pyarrow", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # this project, run from a checkout
            found[name] = "not installed"
    return found


def pair_schema(
    shape: Sequence[int], dtype: str, fingerprint: Fingerprint, provenance: Mapping[str, str]
) -> pa.Schema:
    """The schema of a file of pairs whose tensors are `shape` = (C,h,w) in `dtype`."""
    about = {"shape": json.dumps(list(shape)), "dtype": dtype}
    tensor = pa.binary(prod(shape) * np.dtype(dtype).itemsize)
    return pa.schema(
        [
            pa.field("schema_version", pa.int16()),
            pa.field("pair_id", pa.int64()),
            pa.field("prompt", pa.string()),
            pa.field("seed", pa.int64()),
            pa.field(_NEGATIVE_PROMPT, pa.string()),
            *(pa.field(name, tensor, metadata=about) for name in TENSORS),
        ],
        metadata={
            "dmd.fingerprint": json.dumps(fingerprint.as_dict(), sort_keys=True),
            "dmd.fingerprint_digest": fingerprint.digest,
            "dmd.provenance": json.dumps(dict(provenance), sort_keys=True),
        },
    )


# How rows are written. Tensors of noise do not get smaller: trying costs the writer and, at every
# epoch, the reader.
PARQUET_OPTIONS: dict[str, Any] = {
    "write_page_checksum": True,  # a flipped bit is an error of whoever reads the page
    "use_dictionary": ["prompt", _NEGATIVE_PROMPT],
    "compression": {
        name: "none" if name in TENSORS else "snappy"
        for name in ("schema_version", "pair_id", "prompt", "seed", _NEGATIVE_PROMPT, *TENSORS)
    },
}


def encode_pairs(
    batch: PairBatch,
    seeds: Sequence[int],
    *,
    negative_prompts: Sequence[str | None] | None = None,
    fingerprint: Fingerprint,
    provenance: Mapping[str, str],
) -> pa.Table:
    """Rows of `batch`. Both tensors must have one shape and one dtype, float16 or float32.

    A negative prompt of None, or None for all, is the fingerprint's.
    """
    noise, latents = batch.noise, batch.latents
    if noise.shape != latents.shape or noise.dtype != latents.dtype or noise.dtype not in _DTYPES:
        raise PairSchemaError(
            f"noise is {tuple(noise.shape)} {noise.dtype}, latents are {tuple(latents.shape)} "
            f"{latents.dtype}; expected one shape and one dtype, float16 or float32"
        )
    schema = pair_schema(tuple(noise.shape[1:]), _DTYPES[noise.dtype], fingerprint, provenance)
    columns = [
        pa.array([ROW_SCHEMA_VERSION] * len(batch), pa.int16()),
        pa.array(batch.pair_ids, pa.int64()),
        pa.array(batch.prompts, pa.string()),
        pa.array(seeds, pa.int64()),
        pa.array(
            [None] * len(batch) if negative_prompts is None else negative_prompts, pa.string()
        ),
        _to_bytes(noise, schema.field("noise").type),
        _to_bytes(latents, schema.field("latent").type),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def decode_pairs(table: pa.Table) -> PairBatch:
    """Inverse of `encode_pairs`, bit for bit; raises `PairSchemaError` for any other table."""
    shape, dtype = _check_table(table)
    return PairBatch(
        tuple(table["pair_id"].to_pylist()),
        tuple(table["prompt"].to_pylist()),
        _to_tensor(table["noise"], shape, dtype),
        _to_tensor(table["latent"], shape, dtype),
    )


def decode_negative_prompts(table: pa.Table) -> list[str | None]:
    """The negative prompt of each row; None: the fingerprint's."""
    return table[_NEGATIVE_PROMPT].to_pylist()


def pair_facts(table: pa.Table) -> PairFacts:
    """The numbers alone, for checks of many rows; raises `PairSchemaError` as `decode_pairs` does.

    The arrays are views of the table where a column is one piece of memory.
    """
    shape, dtype = _check_table(table)
    noise, latents = (tensor_values(table[name], prod(shape), dtype) for name in TENSORS)
    return PairFacts(table["pair_id"].to_numpy(), noise, latents)


def _check_table(table: pa.Table) -> tuple[tuple[int, ...], str]:
    """(C,h,w) and the dtype of the tensors of a table that holds nothing but whole pairs."""
    shape, dtype = check_schema(table.schema)
    versions = table["schema_version"].unique().to_pylist()
    if versions not in ([], [ROW_SCHEMA_VERSION]):
        raise PairSchemaError(f"rows of schema version {versions}; expected {ROW_SCHEMA_VERSION}")
    for name in table.column_names:
        if name != _NEGATIVE_PROMPT and table[name].null_count:
            raise PairSchemaError(f"column {name!r} has {table[name].null_count} empty values")
    return shape, dtype


def check_schema(found: pa.Schema) -> tuple[tuple[int, ...], str]:
    """Check that `found` is a schema of pairs; returns (C,h,w) and the dtype of its tensors."""
    return _check_serialized(found.serialize().to_pybytes())


# The files of a generation say the same: of many small ones, this check would be most of the work.
@lru_cache(maxsize=64)
def _check_serialized(schema: bytes) -> tuple[tuple[int, ...], str]:
    found = pa.ipc.read_schema(pa.py_buffer(schema))
    try:
        about = found.field("noise").metadata
        shape, dtype = tuple(json.loads(about[b"shape"])), about[b"dtype"].decode()
        content = json.loads(found.metadata[b"dmd.fingerprint"])
        expected = pair_schema(shape, dtype, Fingerprint(**content), {})
        ours = dtype in _DTYPES.values()
    except (KeyError, TypeError, ValueError) as error:
        expected = "noise and latent with shape and dtype, and dmd.fingerprint of the file"
        raise _mismatch(found, expected) from error
    same = [(field, field.metadata) for field in found] == [
        (field, field.metadata) for field in expected
    ]
    digest = found.metadata.get(b"dmd.fingerprint_digest")
    if not ours or not same or digest != expected.metadata[b"dmd.fingerprint_digest"]:
        raise _mismatch(found, expected)
    return shape, dtype


def fingerprint_digest(schema: pa.Schema) -> str:
    """The digest that a checked schema carries."""
    return schema.metadata[b"dmd.fingerprint_digest"].decode()


def _mismatch(found: pa.Schema, expected: pa.Schema | str) -> PairSchemaError:
    return PairSchemaError(f"not a table of pairs.\nfound:\n{found}\nexpected:\n{expected}")


def _to_bytes(tensor: torch.Tensor, kind: pa.DataType) -> pa.Array:
    array = tensor.detach().cpu().contiguous().numpy()
    little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return pa.Array.from_buffers(kind, len(array), [None, pa.py_buffer(little_endian.tobytes())])


def _views(column: pa.ChunkedArray, elements: int, dtype: str) -> list[np.ndarray]:
    """(n, elements) of each chunk, at least one; a slice starts inside its buffer."""
    width, stored = column.type.byte_width, np.dtype(dtype).newbyteorder("<")
    views = [np.empty((0, elements), stored)] if not len(column) else []
    for chunk in column.chunks:
        if len(chunk):
            count, offset = len(chunk) * elements, chunk.offset * width
            values = np.frombuffer(chunk.buffers()[1], stored, count=count, offset=offset)
            views.append(values.reshape(-1, elements))
    return views


def tensor_values(column: pa.ChunkedArray, elements: int, dtype: str) -> np.ndarray:
    """(n, elements) of a tensor column: a read-only view where it is one piece of memory."""
    views = _views(column, elements, dtype)
    return views[0] if len(views) == 1 else np.concatenate(views)


def _to_tensor(column: pa.ChunkedArray, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """(B, *shape), copied once out of the Arrow buffers."""
    views = _views(column, prod(shape), dtype)
    array = np.empty((len(column), *shape), dtype=dtype)
    np.concatenate(views, out=array.reshape(-1, prod(shape)))
    return torch.from_numpy(array)
