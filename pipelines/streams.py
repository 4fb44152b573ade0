"""Endless, seeded streams of what training draws from: prompts, and real pictures for the GAN.

Epoch e visits permutation(seed, e); a global batch is a slice from a position, whatever the number
of workers, so the state of a stream is its position alone.
"""

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from dmd_core.noise import stable_seed, uniform_words
from pipelines import emoji
from pipelines.batches import part_of_batch
from pipelines.config import StorageSection
from pipelines.storage import Store, open_store

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_METADATA = "metadata.jsonl"  # the captions of an image folder, as the `datasets` library has them
_PICTURE_COLUMNS, _CAPTION_COLUMNS = ("image", "picture", "png"), ("prompt", "text", "caption")
_CACHED_BYTES = 512 << 20


class PictureError(ValueError):
    """Real pictures that cannot be used; names the file."""


class SeededOrder:
    """permutation(seed, epoch) of `size` rows, epochs one after the other."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def rows(self, position: int, global_batch: int, rank: int, world_size: int) -> list[int]:
        """The rows of this worker's part of the global batch that starts at `position`."""
        part = part_of_batch(global_batch, rank, world_size)
        places = range(position + part.start, position + part.stop)
        return [int(self._epoch(p // self._size)[p % self._size]) for p in places]

    def _permutation(self, epoch: int) -> np.ndarray:
        seed = stable_seed("stream", self._seed, epoch)
        return np.argsort(uniform_words(seed, self._size), kind="stable")


class PromptStream:
    """Prompts of a list, in seeded order."""

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        self._prompts, self._order = tuple(prompts), SeededOrder(len(prompts), seed)

    def batch_from(
        self, position: int, global_batch: int, rank: int = 0, world_size: int = 1
    ) -> tuple[str, ...]:
        rows = self._order.rows(position, global_batch, rank, world_size)
        return tuple(self._prompts[row] for row in rows)


@dataclass(frozen=True)
class PictureRef:
    """One real picture: its file inside the store, its row there (Parquet), and its caption."""

    key: str
    row: int
    prompt: str


def open_pictures(source: str, storage: StorageSection) -> tuple[Store, tuple[PictureRef, ...]]:
    """The real pictures of a recipe: a folder or URL, or "emoji", the shipped teacher's own
    training pictures (extra train-teacher)."""
    if source != "emoji":
        store = open_store(source, storage)
        return store, list_pictures(store)
    items = emoji.load_emoji()
    kept = [item for item, held in zip(items, emoji.held_out(items), strict=True) if not held]
    store = open_store(str(kept[0].path.parent))
    return store, tuple(PictureRef(item.path.name, 0, item.caption) for item in kept)


def list_pictures(store: Store) -> tuple[PictureRef, ...]:
    """All pictures of a folder: image files (captions from metadata.jsonl, else empty), or Parquet
    files with columns image and prompt. Raises `PictureError` for none or for a bad list."""
    if not store.fs.exists(store.root):
        raise PictureError(f"{store.url} does not exist; expected a folder of real pictures")
    keys = sorted(str(path)[len(store.root) + 1 :] for path in store.fs.find(store.root))
    tables = [key for key in keys if key.endswith(".parquet")]
    images = [key for key in keys if key.lower().endswith(_SUFFIXES)]
    if tables:
        found = [ref for key in tables for ref in _refs_of_table(store, key)]
    else:
        captions = _captions(store, keys, images)
        found = [PictureRef(key, 0, captions.get(key, "")) for key in images]
    if not found:
        raise PictureError(
            f"{store.url} holds no pictures; expected {', '.join(_SUFFIXES)} files (and "
            f"{_METADATA}), or Parquet files with columns image and prompt"
        )
    return tuple(found)


def pictures_digest(refs: Sequence[PictureRef]) -> str:
    """Names a list of pictures, so that a resumed run knows it reads the same ones."""
    text = json.dumps([[ref.key, ref.row, ref.prompt] for ref in refs])
    return hashlib.sha256(text.encode()).hexdigest()


class PictureStream:
    """Real pictures as latents with their prompts, in seeded order; encoded once, then kept (up to
    512 MB). `encode`: (B,H,W,3) uint8 → (B,C,h,w); `size` (H, W) of the teacher's pictures."""

    def __init__(
        self,
        store: Store,
        refs: Sequence[PictureRef],
        encode: Callable[[np.ndarray], torch.Tensor],
        size: tuple[int, int],
        seed: int,
    ) -> None:
        self._store, self._refs, self._encode, self._size = store, tuple(refs), encode, size
        self._order = SeededOrder(len(refs), seed)
        self._kept: OrderedDict[int, torch.Tensor] = OrderedDict()

    def batch_from(
        self, position: int, global_batch: int, rank: int = 0, world_size: int = 1
    ) -> tuple[torch.Tensor, tuple[str, ...]]:
        """Latents (B,C,h,w) float32 on the CPU and B prompts."""
        rows = self._order.rows(position, global_batch, rank, world_size)
        latents = [self._latents(row) for row in rows]
        while len(self._kept) * latents[0].numel() * latents[0].itemsize > _CACHED_BYTES:
            self._kept.popitem(last=False)
        return torch.stack(latents), tuple(self._refs[row].prompt for row in rows)

    def _latents(self, row: int) -> torch.Tensor:
        """Encoded alone: in a batch, the last bits would depend on what else is in it, and so on
        what was encoded before; a resumed run would differ."""
        if row not in self._kept:
            picture = self._picture(self._refs[row])
            self._kept[row] = self._encode(picture[None])[0].cpu()
        return self._kept[row]

    def _picture(self, ref: PictureRef) -> np.ndarray:
        """(H,W,3) uint8, on white, cut and resized to the teacher's size."""
        path = self._store.path(ref.key)
        in_table = ref.key.endswith(".parquet")
        raw: Any = _cell(self._store, ref) if in_table else self._store.fs.cat_file(path)
        try:
            with Image.open(io.BytesIO(raw)) as file:
                rgba = file.convert("RGBA")
        except (UnidentifiedImageError, OSError) as error:
            raise PictureError(f"{path} (row {ref.row}) is not a picture: {error}") from error
        picture = Image.new("RGBA", rgba.size, "white")
        picture.alpha_composite(rgba)
        return np.asarray(_fitted(picture.convert("RGB"), self._size))


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest middle part of the wanted shape, resized to it."""
    height, width = size
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def _captions(store: Store, keys: Sequence[str], images: Sequence[str]) -> dict[str, str]:
    if _METADATA not in keys:
        return {}
    captions = {}
    path = store.path(_METADATA)
    raw: Any = store.fs.cat_file(path)
    for number, line in enumerate(raw.decode().splitlines(), start=1):
        try:
            entry = json.loads(line)
            captions[str(entry["file_name"])] = str(entry["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise PictureError(
                f'{path} line {number}: expected {{"file_name": …, "text": …}}'
            ) from error
    missing = sorted(set(captions) - set(images))
    if missing:
        raise PictureError(f"{path} names {missing[0]}, which is not a picture in {store.url}")
    return captions


def _refs_of_table(store: Store, key: str) -> list[PictureRef]:
    path = store.path(key)
    try:
        with store.fs.open(path, "rb") as stream:
            file = pq.ParquetFile(stream)
            _column(file.schema_arrow, _PICTURE_COLUMNS, path)
            name = _column(file.schema_arrow, _CAPTION_COLUMNS, path)
            prompts = file.read(columns=[name])[name].to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise PictureError(f"{path} cannot be read: {error}") from error
    return [PictureRef(key, row, prompt or "") for row, prompt in enumerate(prompts)]


def _column(schema: pa.Schema, names: Sequence[str], path: str) -> str:
    for name in names:
        if name in schema.names:
            return name
    raise PictureError(f"{path} has columns {schema.names}; expected one of {', '.join(names)}")


def _cell(store: Store, ref: PictureRef) -> bytes:
    """One picture's bytes: a binary cell, or the `bytes` of the `datasets` library's struct."""
    path = store.path(ref.key)
    with store.fs.open(path, "rb") as stream:
        file = pq.ParquetFile(stream)
        name = _column(file.schema_arrow, _PICTURE_COLUMNS, path)
        start = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if ref.row < start + rows:
                cell = file.read_row_group(group, columns=[name])[name][ref.row - start].as_py()
                return cell["bytes"] if isinstance(cell, dict) else cell
            start += rows
    raise PictureError(f"{path} has no row {ref.row}")
