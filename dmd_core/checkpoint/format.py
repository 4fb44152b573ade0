"""What a checkpoint's folder says about itself: its names, its marker and its index, as JSON.

Whatever is read here may be damaged or made by a stranger: names stay inside the folder, numbers
are bounded, and nothing is believed that the marker's checksums do not cover.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dmd_core.files import join

MARKER, DISCARDED = "MANIFEST.json", "MANIFEST.discarded.json"
INDEX, STATE = "index.json", "state.json"
FORMAT = 1
MAX_JSON_BYTES = 1 << 28
_MAX_NUMBER = 1 << 48
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_PART_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# The names that safetensors gives them.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Tensors = dict[str, torch.Tensor]
Parts = Mapping[str, Mapping[str, "StoredTensor"]]


class CheckpointError(RuntimeError):
    """A checkpoint that exists but cannot be trusted, or one that could not be saved."""


class UntrustedError(CheckpointError):
    """What is wrong with which file; the way on is added where the other steps are known."""


@dataclass(frozen=True)
class StoredFile:
    """Size in bytes and checksum of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor, from `offsets` and of `sizes`, is the tensor `key` of `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True)
class StoredTensor:
    """`size`: of the whole tensor, which its `chunks` fill."""

    dtype: torch.dtype
    size: torch.Size
    chunks: tuple[StoredChunk, ...]


def checkpoint_path(root: str, step: int) -> str:
    return join(root, f"checkpoint-{step:08d}")


def check_part_name(name: str) -> None:
    if not _PART_NAME.fullmatch(name):
        raise ValueError(f"part {name!r}: expected letters, digits, '.', '_', '-' (it names files)")


def part_file(part: str, rank: int) -> str:
    return f"{part}-{rank:05d}.safetensors"


def marker_json(files: Mapping[str, StoredFile]) -> bytes:
    listed = {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in files.items()}
    return json.dumps({"format": FORMAT, "files": listed}, indent=2).encode()


def index_json(parts: Parts) -> bytes:
    listed = {
        part: {
            name: {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "size": list(tensor.size),
                "chunks": [
                    {
                        "offsets": list(chunk.offsets),
                        "sizes": list(chunk.sizes),
                        "file": chunk.file,
                        "key": chunk.key,
                    }
                    for chunk in tensor.chunks
                ],
            }
            for name, tensor in tensors.items()
        }
        for part, tensors in parts.items()
    }
    return json.dumps({"format": FORMAT, "tensors": listed}, separators=(",", ":")).encode()


def parse_object(raw: bytes, path: str) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UntrustedError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UntrustedError(f"{path} holds a {type(found).__name__}, expected an object")
    return found


def parse_marker(raw: bytes, path: str) -> dict[str, StoredFile]:
    """The files that a marker lists, by name."""
    listed = _section(parse_object(raw, path), "files", path)
    files = {}
    for name, entry in listed.items():
        if not _FILE_NAME.fullmatch(name) or name in (MARKER, DISCARDED):
            raise UntrustedError(f"{path} names {name!r:.60}, outside its folder or no data file")
        where = f"{path}: {name}"
        if not isinstance(entry, dict):
            raise UntrustedError(f"{where} is {entry!r:.60}, expected bytes and sha256")
        sha256 = entry.get("sha256")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise UntrustedError(f"{where} has sha256 {sha256!r:.80}, expected 64 hex digits")
        files[name] = StoredFile(_number(entry.get("bytes"), f"{where}: bytes"), sha256)
    for name in (INDEX, STATE):
        if name not in files:
            raise UntrustedError(f"{path} lists no {name}: not a marker of this format")
    return files


def parse_index(raw: bytes, path: str, files: Mapping[str, StoredFile]) -> Parts:
    """The tensors by part and name. Their chunks lie in `files`, and fill them and no more."""
    listed = _section(parse_object(raw, path), "tensors", path)
    parts: dict[str, dict[str, StoredTensor]] = {}
    room = {name: file.bytes for name, file in files.items()}
    for part, tensors in listed.items():
        if not _PART_NAME.fullmatch(part) or not isinstance(tensors, dict):
            raise UntrustedError(f"{path}: part {part!r:.60} is not a part with tensors")
        parts[part] = {
            name: _tensor(entry, f"{path}: {part}/{name}", room) for name, entry in tensors.items()
        }
    return parts


def _tensor(entry: Any, where: str, room: dict[str, int]) -> StoredTensor:
    if not isinstance(entry, dict) or not isinstance(entry.get("chunks"), list):
        raise UntrustedError(f"{where} has no chunks")
    name = entry.get("dtype")
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise UntrustedError(f"{where} has dtype {name!r:.60}, expected one of {', '.join(DTYPES)}")
    size = _numbers(entry.get("size"), f"{where}: size")
    if math.prod(max(side, 1) for side in size) > _MAX_NUMBER:
        raise UntrustedError(f"{where} has size {list(size)}, which is too large")
    chunks = tuple(
        _chunk(each, f"{where}: chunk {i}", size, dtype, room)
        for i, each in enumerate(entry["chunks"])
    )
    filled = sum(math.prod(chunk.sizes) for chunk in chunks)
    if not chunks or filled != math.prod(size) or len({c.offsets for c in chunks}) != len(chunks):
        raise UntrustedError(
            f"{where}: its {len(chunks)} chunks hold {filled} elements, expected each of its "
            f"{math.prod(size)} once"
        )
    return StoredTensor(dtype, torch.Size(size), chunks)


def _chunk(
    entry: Any, where: str, size: tuple[int, ...], dtype: torch.dtype, room: dict[str, int]
) -> StoredChunk:
    if not isinstance(entry, dict):
        raise UntrustedError(f"{where} is {entry!r:.60}, expected an object")
    offsets = _numbers(entry.get("offsets"), f"{where}: offsets")
    sizes = _numbers(entry.get("sizes"), f"{where}: sizes")
    inside = len(offsets) == len(sizes) == len(size) and all(
        offset + side <= whole for offset, side, whole in zip(offsets, sizes, size, strict=True)
    )
    if not inside:
        raise UntrustedError(
            f"{where} is at {list(offsets)} of size {list(sizes)}, outside of {list(size)}"
        )
    file, key = entry.get("file"), entry.get("key")
    if not isinstance(file, str) or not isinstance(key, str) or file not in room:
        raise UntrustedError(f"{where} is {key!r:.60} of {file!r:.60}, a file the marker lacks")
    room[file] -= math.prod(sizes) * dtype.itemsize
    if room[file] < 0:
        raise UntrustedError(f"{where}: {file} is too small for the tensors that it should hold")
    return StoredChunk(offsets, sizes, file, key)


def _section(found: dict[str, Any], name: str, path: str) -> dict[str, Any]:
    if found.get("format") != FORMAT or not isinstance(found.get(name), dict):
        raise UntrustedError(
            f"{path} has format {found.get('format')!r} and {name} of type "
            f"{type(found.get(name)).__name__}, expected format {FORMAT} and an object"
        )
    return found[name]


def _numbers(found: Any, where: str) -> tuple[int, ...]:
    if not isinstance(found, list) or len(found) > 64:
        raise UntrustedError(f"{where} is {found!r:.60}, expected a list of at most 64 numbers")
    return tuple(_number(each, where) for each in found)


def _number(found: Any, where: str) -> int:
    if type(found) is not int or not 0 <= found <= _MAX_NUMBER:
        raise UntrustedError(f"{where} is {found!r:.60}, expected a whole number up to 2^48")
    return found
