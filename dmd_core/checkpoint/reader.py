"""Where torch.distributed.checkpoint reads from: pieces of safetensors files, verified."""

from collections import defaultdict
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from dmd_core.checkpoint.folder import MarkedFolder
from dmd_core.checkpoint.format import DTYPE_NAMES, Parts, StoredChunk, UntrustedError
from dmd_core.files import join, store_errors


class FolderReader(StorageReader):
    """Reads tensors of one checkpoint; every rank has one, and fetches the files that it needs.

    `failure`: what the store raised on this rank.
    """

    def __init__(self, folder: MarkedFolder, parts: Parts) -> None:
        self.folder, self.failure = folder, None
        self._metadata = _metadata(parts)
        self._tensors = {
            f"{part}/{name}": tensor
            for part, ours in parts.items()
            for name, tensor in ours.items()
        }

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[ReadItem, StoredChunk]]] = defaultdict(list)
        for item in plan.items:
            chunk = self._chunk(item.storage_index)
            by_file[chunk.file].append((item, chunk))
        try:
            for name, reads in sorted(by_file.items()):
                with self.folder.verified(name) as local:
                    self._read_file(name, local, reads, planner)
        except store_errors() as error:
            self.failure = error
            raise OSError(f"{type(error).__name__}: {error}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def _chunk(self, index: MetadataIndex) -> StoredChunk:
        chunks = self._tensors[index.fqn].chunks
        if index.index is not None and chunks[index.index].offsets == index.offset:
            return chunks[index.index]
        return next(chunk for chunk in chunks if chunk.offsets == index.offset)

    def _read_file(
        self,
        name: str,
        local: str,
        reads: list[tuple[ReadItem, StoredChunk]],
        planner: LoadPlanner,
    ) -> None:
        try:
            with safe_open(local, framework="pt") as file:
                for item, chunk in reads:
                    dtype = self._tensors[item.storage_index.fqn].dtype
                    source = _read_box(file, item, chunk, dtype)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(source)
                    planner.commit_tensor(item, target)
        except SafetensorError as error:
            path = join(self.folder.path, name)
            raise UntrustedError(f"{path} is not what the index says: {error}") from error


def _metadata(parts: Parts) -> Metadata:
    return Metadata(
        {
            f"{part}/{name}": TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype),
                tensor.size,
                [
                    ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                    for chunk in tensor.chunks
                ],
            )
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }
    )


def _read_box(file: Any, item: ReadItem, chunk: StoredChunk, dtype: torch.dtype) -> torch.Tensor:
    stored = file.get_slice(chunk.key)
    shape, name = tuple(stored.get_shape()), stored.get_dtype()
    if shape != chunk.sizes or name != DTYPE_NAMES[dtype]:
        raise SafetensorError(
            f"{chunk.key} is {name} {list(shape)}, expected {DTYPE_NAMES[dtype]} "
            f"{list(chunk.sizes)}"
        )
    if tuple(item.lengths) == chunk.sizes:
        return file.get_tensor(chunk.key)
    box = tuple(
        slice(start, start + length)
        for start, length in zip(item.storage_offsets, item.lengths, strict=True)
    )
    return stored[box] if 0 not in item.lengths else torch.empty(item.lengths, dtype=dtype)
