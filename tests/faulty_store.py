"""A store whose operations are counted, and one of which fails or is the last of its process.

For tests in process: the filesystem object itself is changed, so that `isinstance` and what
unpickles from it (in a worker) stay as they are. One call by the program is one operation,
whatever it does inside. On a local disk the steps of `publish_local` count as well, through
`os.link`, `os.replace`, `os.remove` and `os.fsync` of paths in the store. Not seen: what goes
through `Store.arrow` of a local disk, and writes to a file that `open` gave.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from dmd_core.files import is_local
from pipelines.storage import Store, open_store

_OPERATIONS = (
    "cat", "cat_file", "cat_ranges", "copy", "cp_file", "delete", "du", "exists", "find", "get",
    "get_file", "glob", "info", "isdir", "isfile", "ls", "makedirs", "mkdir", "move", "mv", "open",
    "pipe", "pipe_file", "put", "put_file", "read_block", "rm", "rm_file", "size", "touch",
    "walk", "write_bytes", "read_bytes",
)  # fmt: skip
_PUBLISHING = ("fsync", "link", "replace", "remove", "unlink", "rename")


class StoreFault(OSError):
    """An operation that failed because the test wanted it to."""


class Killed(BaseException):
    """The process ends here: not an Exception, so that no handler goes on."""


What = Literal["fail before", "fail after", "kill", "call"]


@dataclass(frozen=True)
class Turn:
    """What befalls one operation.

    "fail before": not done, `StoreFault`. "fail after": done, and `StoreFault` all the same.
    "kill": `Killed`, here and at every later operation, so that no clean-up does what a process
    that was killed could not have done. "call": `action` runs first, such as another writer.
    """

    what: What
    action: Callable[[], None] | None = None


@dataclass
class Gate:
    """What every operation passes. `turns`: index of the operation (from 0) → what befalls it."""

    turns: Mapping[int, Turn] = field(default_factory=dict)
    operations: list[tuple[str, str]] = field(default_factory=list)  # (name, path), in order
    hits: list[int] = field(default_factory=list)
    _dead: bool = False
    _inside: threading.local = field(default_factory=threading.local)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, name: str, path: str, operation: Callable[[], Any]) -> Any:
        if getattr(self._inside, "yes", False):
            return operation()
        with self._lock:
            index = len(self.operations)
            here = f"operation {index}: {name} {path}"
            if self._dead:
                raise Killed(f"after the kill, {here}")
            self.operations.append((name, path))
            turn = self.turns.get(index)
            if turn is not None:
                self.hits.append(index)
            self._dead = turn is not None and turn.what == "kill"
        if self._dead:
            raise Killed(here)
        if turn is not None and turn.what == "fail before":
            raise StoreFault(f"{here} was not done")
        self._inside.yes = True
        try:
            if turn is not None and turn.action is not None:
                turn.action()
            result = operation()
        finally:
            self._inside.yes = False
        if turn is not None and turn.what == "fail after":
            raise StoreFault(f"{here} was done")
        return result


@contextmanager
def gated(store: Store, gate: Gate) -> Iterator[Store]:
    """Yield a store over the same files whose operations pass `gate`."""
    fs = _own_copy(store.fs)
    for name in _OPERATIONS:
        if hasattr(fs, name):
            setattr(fs, name, _through(gate, name, getattr(fs, name)))
    if not is_local(fs):
        yield replace(store, fs=fs)
        return
    with _publishing_through(gate, store.root):
        yield replace(store, fs=fs)


def every_index(run: Callable[[Gate], object], what: What) -> Iterator[Gate]:
    """Call `run` with a gate that has its turn at operation 0, then 1, 2, … until one is not met.

    Yields each gate that was met, for the caller to look at what is left and to run again. `run`
    may end with Killed or StoreFault, or swallow the fault; what else it raises is passed on.
    """
    index = 0
    while True:
        gate = Gate({index: Turn(what)})
        with suppress(Killed, StoreFault):
            run(gate)
        if not gate.hits:
            return
        yield gate
        index += 1


def _own_copy(fs: AbstractFileSystem) -> AbstractFileSystem:
    copy = type(fs)(*fs.storage_args, **fs.storage_options, skip_instance_cache=True)
    if hasattr(fs, "store"):  # in memory: the files are in the object, or in its class
        copy.store, copy.pseudo_dirs = fs.store, fs.pseudo_dirs
    return copy


def _through(gate: Gate, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        path = str(args[0]) if args else ""
        return gate.run(name, path, lambda: method(*args, **kwargs))

    return call


@contextmanager
def _publishing_through(gate: Gate, root: str) -> Iterator[None]:
    """Count the steps of `publish_local` on paths under `root`, in the whole process."""
    real = {name: getattr(os, name) for name in _PUBLISHING}

    def stand_in(name: str) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
            if not os.fspath(path).startswith(root):
                return real[name](target, *args, **kwargs)
            return gate.run(name, str(path), lambda: real[name](target, *args, **kwargs))

        return call

    with patch.multiple(os, **{name: stand_in(name) for name in _PUBLISHING}):
        yield


def disk_or_memory(kind: str, folder: Path) -> Store:
    """A run's folder on the local disk, or on what stands for an object store: a PUT is all or
    nothing. `kind`: disk or memory."""
    if kind == "disk":
        return open_store(str(folder / "run"))
    memory = MemoryFileSystem(skip_instance_cache=True)
    memory.store, memory.pseudo_dirs = {}, [""]  # not those of the class
    return Store(memory, "/run")
