"""The store fails, or the process dies, at every operation in turn; the same call then goes on.

What it leaves must be what an undisturbed run leaves: file by file and byte by byte, for the pairs
here follow from their ids. Only numbers, commit ids and the lease may differ.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines import lease as lease_module
from pipelines.batches import PairReader
from pipelines.collect import collect_garbage, needs_collecting
from pipelines.commits import StoreError
from pipelines.lease import hold_lease
from pipelines.manifest import latest_manifest, list_versions, void_next_number
from pipelines.prompts import PromptSource, find_landed, prepare_prompts
from pipelines.seal import seal_generation
from pipelines.storage import Store, open_store
from tests.chaos.stand_in import OTHER, regenerate
from tests.faulty_store import Gate, StoreFault, What, every_index, gated
from tests.pipelines.made_pairs import FINGERPRINT, land_ids, write_file

FAULTS: tuple[What, ...] = ("kill", "fail before", "fail after")
PERIOD_S = 60.0  # no beat comes in the middle of a run: operations count the same each time
NUMBERS = {"seed": 0, "samples_per_prompt": 2}


class InOneThread:
    """In place of a pool, so that operation k is the same one each time."""

    def __init__(self, max_workers: int) -> None:
        pass

    def __enter__(self) -> "InOneThread":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    map = staticmethod(map)

    def submit(self, work: Callable, item: object) -> Future:
        done: Future = Future()
        done.set_result(work(item))
        return done


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """A killed holder is this very process: say that it is gone. No threads, no slow disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(lease_module, "is_gone", lambda process: True)
    for module in ("bounded", "collect", "manifest"):
        monkeypatch.setattr(f"pipelines.{module}.ThreadPoolExecutor", InOneThread)


@dataclass
class Copies:
    """Data sets that all begin as `first` does."""

    first: Store
    folder: str
    count: Iterator[int]

    def next(self) -> Store:
        if isinstance(self.first.fs, MemoryFileSystem):
            fs = MemoryFileSystem(skip_instance_cache=True)
            fs.store = {name: _copy(fs, file) for name, file in self.first.fs.store.items()}
            fs.pseudo_dirs = list(self.first.fs.pseudo_dirs)
            return Store(fs, self.first.root)
        root = f"{self.folder}/copy{next(self.count)}"
        shutil.copytree(self.first.root, root)
        return open_store(root)

    def drop(self, store: Store) -> None:
        if not isinstance(store.fs, MemoryFileSystem):
            shutil.rmtree(store.root)


def _copy(fs: MemoryFileSystem, file):
    return type(file)(fs, file.path, file.getvalue())


@pytest.fixture(params=["local", "object store"])
def copies(request, tmp_path) -> Copies:
    if request.param == "local":
        (tmp_path / "set").mkdir()
        return Copies(open_store(str(tmp_path / "set")), str(tmp_path), itertools.count())
    fs = MemoryFileSystem(skip_instance_cache=True)
    fs.store, fs.pseudo_dirs = {}, [""]
    return Copies(Store(fs, "/set"), "", itertools.count())


def content(root: Store) -> dict[str, object]:
    """All that a reader, or a later run, can find in the data set: path → what it says.

    Checks on the way that every version names whole files that are there, and each row once.
    """
    found: dict[str, object] = {}
    for path in sorted(root.fs.find(root.root)):
        key = path.removeprefix(root.root).lstrip("/")
        part = key.split("/")[0]
        unseen = key.endswith(".tmp") or ".probe-" in key  # nobody reads those
        if part in ("leases", "manifests") or "/runs/" in key or unseen:
            continue
        assert ".pending" not in key
        found[key] = hashlib.sha256(root.fs.cat_file(path)).hexdigest()
    for number in list_versions(root):
        manifest = json.loads(root.fs.cat_file(root.path("manifests", f"{number:06d}.json")))
        for file in manifest["files"]:
            assert found[file["key"]] == file["sha256"], file["key"]
        for name in ("version", "commit_id", "fence"):
            manifest.pop(name, None)
        text = json.dumps(manifest, sort_keys=True)
        place = f"version {len(found)}"
        assert text not in found.values(), "sealed twice"
        found[place] = text
    newest = latest_manifest(root)
    if newest is not None:
        pairs = PairReader(root, newest, seed=0, verify=True).rows(np.arange(newest.rows))
        assert len(set(pairs.pair_ids)) == len(pairs) == newest.rows
    return found


def assert_harmless(copies: Copies, run: Callable[[Store], object], what: What, least: int) -> None:
    """`run` meets `what` at each of its operations (at `least` so many); then it runs again."""
    plain = copies.next()
    run(plain)
    expected = content(plain)

    def disturbed(gate: Gate) -> None:
        disturbed.store = copies.next()
        with gated(disturbed.store, gate) as store:
            try:
                run(store)
            except StoreError as error:  # the fault in other words
                assert isinstance(error.__cause__, StoreFault), error

    count = 0
    for count, gate in enumerate(every_index(disturbed, what), 1):
        where = (what, count - 1, gate.operations[count - 1])
        _assert_nothing_named_is_missing(disturbed.store, where)
        run(disturbed.store)
        assert content(disturbed.store) == expected, where
        copies.drop(disturbed.store)
    assert count >= least, f"only {count} operations were met"


def _assert_nothing_named_is_missing(root: Store, where: object) -> None:
    """Also in the moment after the fault: a reader may come then."""
    newest = latest_manifest(root)
    for file in newest.files if newest else ():
        path = root.path(file.key)
        assert root.fs.exists(path) and root.fs.size(path) == file.bytes, (where, path)


# ---------------------------------------------------------------- the first lease


@pytest.mark.parametrize("what", FAULTS)
def test_a_store_that_fails_once_is_not_said_to_ignore_conditions(copies, what):
    def disturbed(gate: Gate) -> None:
        with gated(copies.next(), gate) as store:
            try:
                with leased(store):
                    pass
            except StoreError as error:
                assert "If-None-Match" not in str(error), (gate.operations[-3:], str(error))

    assert len(list(every_index(disturbed, what))) >= 8


# ---------------------------------------------------------------- landing


@pytest.mark.parametrize("what", FAULTS)
def test_landing(copies, tmp_path, what):
    prompts = tmp_path / "prompts.jsonl"
    sizes = ({}, {}, {"height": 16, "width": 16}, {"height": 32, "width": 16})
    rows = [{"prompt": f"prompt {number}"} | size for number, size in enumerate(sizes)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = PromptSource((str(prompts),))

    def land(root: Store) -> None:
        folder = tmp_path / "prepared"
        shutil.rmtree(folder, ignore_errors=True)
        prepared = prepare_prompts(source, None, str(folder), **NUMBERS)
        landed = prepared.publish(root)
        assert find_landed(source, None, root, **NUMBERS) == landed and len(landed.files) == 3

    assert_harmless(copies, land, what, least=8)


# ---------------------------------------------------------------- sealing


@pytest.mark.parametrize("what", FAULTS)
def test_sealing(copies, what):
    first = used(copies.first)
    write_file(first, "a-0.parquet", range(6))
    seal_generation(first, FINGERPRINT, land_ids(first, range(6)))
    write_file(first, "b-0.parquet", [4, 5, 6, 7, 99])  # two again, and one nobody asked for
    landed = land_ids(first, range(8))

    def seal(root: Store) -> None:
        with leased(root) as lease:
            manifest = seal_generation(root, FINGERPRINT, landed, lease=lease)
        assert manifest.rows == 8 and manifest.excluded_ids == (4, 5, 99)

    assert_harmless(copies, seal, what, least=15)


# ---------------------------------------------------------------- collecting


@pytest.mark.parametrize("what", FAULTS)
def test_collecting(copies, what):
    first = used(copies.first)
    write_file(first, "a-0.parquet", range(4), fingerprint=OTHER)
    seal_generation(first, OTHER, land_ids(first, range(4)))
    for last in (5, 6):
        write_file(first, f"b{last}-0.parquet", range(last))
        seal_generation(first, FINGERPRINT, land_ids(first, range(last)))
    write_file(first, "c-0.parquet", [1, 2])  # of a writer that was thought dead

    def collect(root: Store) -> None:
        with leased(root) as lease:
            collect_garbage(root, lease, keep=1)
        assert not needs_collecting(root, 1) and len(list_versions(root)) == 1

    assert_harmless(copies, collect, what, least=30)


# ---------------------------------------------------------------- all of it


@pytest.mark.parametrize("what", FAULTS)
def test_regenerating(copies, tmp_path, what):
    """Other prompts and another sampler than those of the version that is there."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\na blue whale")
    regenerate(copies.first, str(prompts), FINGERPRINT)
    prompts.write_text("a red fox\na green apple\na flag")

    def run(root: Store) -> None:
        regenerate(root, str(prompts), OTHER)
        newest = latest_manifest(root)
        assert newest is not None and newest.rows == 6
        assert newest.fingerprint_digest == OTHER.digest and len(list_versions(root)) == 1

    assert_harmless(copies, run, what, least=60)


def used(root: Store) -> Store:
    """Somebody has held the lease before, and so has tried what the store can do."""
    with leased(root):
        return root


def leased(root: Store):
    return hold_lease(root, period_s=PERIOD_S, purpose="a test", void_next=void_next_number)
