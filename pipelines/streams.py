"""Endless, seeded streams of what training draws from: prompts, and real pictures for the GAN.

Epoch e visits permutation(seed, e); a global batch is a slice from a position, whatever the number
of workers, so the state of a stream is its position alone.
"""

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from dmd_core.noise import stable_seed, uniform_words
from pipelines import emoji
from pipelines.batches import part_of_batch
from pipelines.bounded import map_bounded
from pipelines.config import StorageSection
from pipelines.picture_tables import PictureError, PictureRef, PictureTables, refs_of_table
from pipelines.storage import Store, open_store

__all__ = [
    "PictureError", "PictureRef", "PictureStream", "PromptStream", "list_pictures",
    "open_pictures", "pictures_at_once", "pictures_digest",
]  # fmt: skip

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_METADATA = "metadata.jsonl"  # the captions of an image folder, as the `datasets` library has them
_CACHED_BYTES = 512 << 20
_MOST_AT_ONCE, _PIXELS_AT_ONCE = 8, 1 << 20


class SeededOrder:
    """permutation(seed, epoch) of `size` rows, epochs one after the other."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def rows_from(self, position: int, count: int) -> list[int]:
        """`count` rows of the stream, from `position` on."""
        places = range(position, position + count)
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
        part = part_of_batch(global_batch, rank, world_size)
        rows = self._order.rows_from(position + part.start, len(part))
        return tuple(self._prompts[row] for row in rows)


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
        found = [ref for key in tables for ref in refs_of_table(store, key)]
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
    512 MB). `encode`: (B,H,W,3) uint8 → (B,C,h,w); `size` (H, W) of the teacher's pictures.

    Always `at_once` pictures are encoded together: in batches of different sizes the last bits of
    a row would depend on what was encoded before, and a resumed run would differ.
    """

    def __init__(
        self,
        store: Store,
        refs: Sequence[PictureRef],
        encode: Callable[[np.ndarray], torch.Tensor],
        size: tuple[int, int],
        seed: int,
        *,
        at_once: int = 1,
    ) -> None:
        self._store, self._refs, self._encode, self._size = store, tuple(refs), encode, size
        self._at_once = at_once
        in_tables = bool(refs) and refs[0].key.endswith(".parquet")
        self._tables = PictureTables(store, refs, seed) if in_tables else None
        self._order = self._tables or SeededOrder(len(refs), seed)
        self._kept: OrderedDict[int, torch.Tensor] = OrderedDict()

    def batch_from(
        self, position: int, global_batch: int, rank: int = 0, world_size: int = 1
    ) -> tuple[torch.Tensor, tuple[str, ...]]:
        """Latents (B,C,h,w) float32 on the CPU and B prompts."""
        part = part_of_batch(global_batch, rank, world_size)
        rows = self._order.rows_from(position + part.start, len(part))
        self._keep([row for row in dict.fromkeys(rows) if row not in self._kept])
        latents = [self._kept[row] for row in rows]
        while len(self._kept) * latents[0].numel() * latents[0].itemsize > _CACHED_BYTES:
            self._kept.popitem(last=False)
        return torch.stack(latents), tuple(self._refs[row].prompt for row in rows)

    def _keep(self, rows: Sequence[int]) -> None:
        """Encode them; the next ones are fetched and decoded meanwhile."""
        pictures = map_bounded(lambda found: self._picture(*found), self._found(rows))
        for start in range(0, len(rows), self._at_once):
            part = rows[start : start + self._at_once]
            batch = [next(pictures) for _ in part]
            batch += batch[:1] * (self._at_once - len(part))
            latents = self._encode(np.stack(batch)).cpu()
            self._kept.update((row, latents[i].clone()) for i, row in enumerate(part))

    def _found(self, rows: Sequence[int]) -> Iterator[tuple[PictureRef, bytes | None]]:
        """Each picture, and its bytes where it lies in a table; a file is fetched in a thread."""
        cells = self._tables.cells(rows) if self._tables else (None for _ in rows)
        return zip((self._refs[row] for row in rows), cells, strict=True)

    def _picture(self, ref: PictureRef, cell: bytes | None) -> np.ndarray:
        """(H,W,3) uint8, on white, cut and resized to the teacher's size."""
        path = self._store.path(ref.key)
        raw: Any = self._store.fs.cat_file(path) if cell is None else cell
        try:
            with Image.open(io.BytesIO(raw)) as file:
                rgba = file.convert("RGBA")
        except (UnidentifiedImageError, OSError) as error:
            raise PictureError(f"{path} (row {ref.row}) is not a picture: {error}") from error
        picture = Image.new("RGBA", rgba.size, "white")
        picture.alpha_composite(rgba)
        return np.asarray(_fitted(picture.convert("RGB"), self._size))


def pictures_at_once(size: tuple[int, int], device: torch.device) -> int:
    """How many pictures of `size` (H, W) are encoded together: on a GPU as many as a VAE is given
    in one call; on a CPU one, for more are no faster there."""
    if device.type == "cpu":
        return 1
    return max(1, min(_MOST_AT_ONCE, _PIXELS_AT_ONCE // (size[0] * size[1])))


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
