"""Where torch.distributed.checkpoint writes to: safetensors and JSON in one folder, no pickle.

The order is what makes a kill harmless: the old marker goes, then the old files; then come the new
files, and the new marker when all of them are on the disk.
"""

import hashlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from fsspec import AbstractFileSystem
from safetensors import SafetensorError
from torch.distributed.checkpoint import StorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dmd_core.checkpoint.folder import (
    check_size,
    digest,
    remove_folder,
    sync_folder,
)
from dmd_core.checkpoint.format import (
    INDEX,
    MARKER,
    STATE,
    StoredChunk,
    StoredFile,
    StoredTensor,
    UntrustedError,
    index_json,
    marker_json,
    part_file,
)
from dmd_core.checkpoint.ranks import portable
from dmd_core.files import is_local, join, store_errors, write_atomic


class FolderWriter(StorageWriter):
    """Writes one checkpoint; every rank has one. `failure`: what the store raised on this rank."""

    def __init__(
        self, fs: AbstractFileSystem, path: str, parts: Sequence[str], state: bytes
    ) -> None:
        self.fs, self.path, self.parts, self.state = fs, path, parts, state
        self.failure: BaseException | None = None
        self._rank = 0

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = kwargs["rank"]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        with self._portable():
            remove_folder(self.fs, self.path)
            if is_local(self.fs):  # elsewhere it would ask for the bucket, or even create it
                self.fs.makedirs(self.path, exist_ok=True)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        by_part: dict[str, list[WriteItem]] = defaultdict(list)
        for item in plan.items:
            by_part[item.index.fqn.split("/", 1)[0]].append(item)
        results: list[WriteResult] = []
        with self._portable():
            for part, items in sorted(by_part.items()):
                results += self._write_part(part_file(part, self._rank), items, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        flat = [result for of_rank in results for result in of_rank]
        parts = _stored_parts(metadata, flat, self.parts)
        files = {result.storage_data[0].file: result.storage_data[1] for result in flat}
        with self._portable():
            for name, file in files.items():
                self._check_shared(name, file)
            for name, raw in ((STATE, self.state), (INDEX, index_json(parts))):
                write_atomic(self.fs, join(self.path, name), raw)
                files[name] = StoredFile(len(raw), hashlib.sha256(raw).hexdigest())
            sync_folder(self.fs, self.path)
            self._commit(marker_json(files))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def _write_part(
        self, name: str, items: list[WriteItem], planner: SavePlanner
    ) -> list[WriteResult]:
        tensors, chunks = _tensors_of_file(name, items, planner)
        if is_local(self.fs):
            path = join(self.path, name)
            file = _write_local(tensors, path)
            sync_folder(self.fs, self.path)
        else:
            with tempfile.TemporaryDirectory(prefix="dmd-checkpoint-") as folder:
                local = str(Path(folder) / name)
                file = _write_local(tensors, local)
                self.fs.put_file(local, join(self.path, name))
        return [
            WriteResult(item.index, 0, (chunk, file))
            for item, chunk in zip(items, chunks, strict=True)
        ]

    def _check_shared(self, name: str, file: StoredFile) -> None:
        """Other ranks wrote some of the files, perhaps on a disk that only they see."""
        try:
            check_size(self.fs, join(self.path, name), file.bytes)
        except UntrustedError as error:
            raise OSError(f"{error}; is the folder the same one for every node?") from error

    def _commit(self, marker: bytes) -> None:
        """The reply to a write may be lost; a save that is told as failed leaves no marker."""
        path = join(self.path, MARKER)
        try:
            write_atomic(self.fs, path, marker)
            sync_folder(self.fs, self.path)
        except store_errors():
            if is_local(self.fs):
                with suppress(*store_errors()):
                    self.fs.rm_file(path)
                raise
            if not _holds(self.fs, path, marker):
                raise

    @contextmanager
    def _portable(self) -> Iterator[None]:
        """Keep what the store raises, and raise what can be sent to the other ranks."""
        try:
            yield
        except store_errors() as error:
            self.failure = error
            raise portable(error) from error


def _holds(fs: AbstractFileSystem, path: str, raw: bytes) -> bool:
    try:
        return fs.cat_file(path) == raw
    except store_errors():
        return False


def _write_local(tensors: dict[str, torch.Tensor], path: str) -> StoredFile:
    try:
        safetensors.torch.save_file(tensors, path)
    except SafetensorError as error:  # so does it report a full disk
        raise OSError(f"{path}: {error}") from error
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
    return digest(path)


def _tensors_of_file(
    name: str, items: list[WriteItem], planner: SavePlanner
) -> tuple[dict[str, torch.Tensor], list[StoredChunk]]:
    """What safetensors can write: contiguous tensors on the CPU, no two in the same memory."""
    tensors: dict[str, torch.Tensor] = {}
    chunks, memories = [], set()
    for item in items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor) and item.tensor_data is not None
        whole = tensor.detach().cpu().contiguous()
        memory = whole.untyped_storage().data_ptr()
        tensors_key = _key(item)
        tensors[tensors_key] = whole.clone() if memory in memories else whole
        memories.add(memory)
        box = item.tensor_data.chunk
        chunks.append(StoredChunk(tuple(box.offsets), tuple(box.sizes), name, tensors_key))
    return tensors, chunks


def _key(item: WriteItem) -> str:
    """The tensor's own name, with the place of the piece where it is only one."""
    assert item.tensor_data is not None
    name, box = item.index.fqn.split("/", 1)[1], item.tensor_data.chunk
    if box.sizes == item.tensor_data.size:
        return name
    return f"{name}@{','.join(map(str, box.offsets))}"


def _stored_parts(
    metadata: Metadata, results: list[WriteResult], parts: Sequence[str]
) -> dict[str, dict[str, StoredTensor]]:
    chunks: dict[str, list[StoredChunk]] = defaultdict(list)
    for result in results:
        chunks[result.index.fqn].append(result.storage_data[0])
    stored: dict[str, dict[str, StoredTensor]] = {part: {} for part in parts}
    for fqn, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        part, name = fqn.split("/", 1)
        stored[part][name] = StoredTensor(entry.properties.dtype, entry.size, tuple(chunks[fqn]))
    return stored
