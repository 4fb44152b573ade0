"""The log of versions against a model: whatever happens, in any order, at any operation.

Each step is one program: it takes the lease, makes files, commits, collects or pins. It may be
killed or fail at any of its operations, and another program may run in full just before any of
them, as if this one had been frozen. The model remembers what was once promised.
"""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from typing import cast
from unittest.mock import patch

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dmd_core.files import write_atomic
from pipelines.collect import collect_garbage
from pipelines.commits import StoreError
from pipelines.dataset_pins import pin_versions, unpin
from pipelines.lease import Lease, LeaseHeldError, LeaseLostError, hold_lease
from pipelines.manifest import (
    ManifestError,
    commit_manifest,
    latest_of,
    list_versions,
    load_manifest,
    log_numbers,
    void_next_number,
)
from pipelines.manifest_model import SCHEMA_VERSION, ManifestBody, ManifestFile
from pipelines.seal import data_keys
from pipelines.storage import Store, open_store
from tests.faulty_store import Gate, Killed, StoreFault, Turn, What, gated
from tests.pipelines.made_pairs import FINGERPRINT

TEACHERS = (FINGERPRINT, replace(FINGERPRINT, steps=6))
KEEP = 2
# Other programs: all but a reader's pin take the lease first; "overtake" goes through all numbers.
OTHERS = ("take over", "commit", "collect", "overtake", "pin")
# A step of the log does 10 to 60 operations, a commit about 15.
moments = st.integers(0, 40)
teachers = st.integers(0, 1)
turns = st.one_of(
    st.none(),
    st.tuples(moments, st.sampled_from(("kill", "fail before", "fail after"))),
    st.tuples(moments, st.sampled_from(OTHERS)),
)


class InOneThread:
    """In place of a pool, so that a step repeats exactly."""

    def __init__(self, max_workers: int) -> None:
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        return None


class VersionLog(RuleBasedStateMachine):
    def make_store(self) -> Store:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.root = self.make_store()
        for target, stand_in in (
            ("pipelines.commits.time.sleep", lambda seconds: None),
            ("pipelines.collect.ThreadPoolExecutor", InOneThread),
            ("pipelines.lease._beat_on", lambda *arguments: None),
            ("pipelines.lease.is_gone", lambda holder: True),  # every other process is dead
        ):
            self.stack.enter_context(patch(target, stand_in))
        self.seen: dict[int, bytes] = {}  # versions, as they were first seen
        self.highest = 0  # of all numbers of the log, also void ones
        self.given_up: set[int] = set()  # versions that a collector may have deleted
        self.pins: dict[str, int] = {}  # that their holders believe in
        self.floor = 0  # the fence that has taken over: none below it may commit
        self.files = 0
        self.leases: list[Lease] = []
        self.take_over()

    def teardown(self) -> None:
        self.stack.close()

    # ------------------------------------------------------------ programs

    def run(self, program: Callable[[Store], None], *turns) -> Gate:
        """Run it, disturbed by `turns`: (index of the operation, what befalls it), or None."""
        turns = [turn for turn in turns if turn is not None]
        gate = Gate({moment: self.as_turn(name) for moment, name in turns})
        expected = (Killed, StoreFault, StoreError, LeaseHeldError)
        if any(name in OTHERS for _, name in turns):  # what it listed may be collected since
            expected += (ManifestError, FileNotFoundError)
        try:
            with gated(self.root, gate) as store:
                program(store)
        except LeaseLostError:
            return gate
        except expected:
            assert gate.hits
        finally:
            self.look()
        return gate

    def as_turn(self, name: str) -> Turn:
        if name not in OTHERS:
            return Turn(cast(What, name))

        def other() -> None:
            self.look()  # what was committed so far was committed in time
            if name == "pin":
                self.pin(self.root, "reader")
            else:
                self.take_over()
            for _ in range({"commit": 1, "overtake": KEEP + 1}.get(name, 0)):
                self.commit(self.root, self.leases[-1], 0, 1)
            if name in ("collect", "overtake"):
                self.collect(self.root, self.leases[-1])
            self.look()

        return Turn("call", other)

    def take_over(self, store: Store | None = None) -> None:
        holding: AbstractContextManager[Lease] = hold_lease(
            store or self.root, period_s=3600, purpose="a test", void_next=void_next_number
        )
        lease = holding.__enter__()
        self.stack.callback(_leave, holding)
        lease._root = self.root  # beyond the step that took it
        self.floor = lease.fence
        self.leases.append(lease)

    def make_file(self, store: Store, lease: Lease, teacher: int) -> None:
        self.files += 1
        name, folder = f"{lease.fence:06d}_{self.files}", TEACHERS[teacher].folder
        write_atomic(store.fs, store.path(folder, "data", f"{name}-0.parquet"), name.encode())
        write_atomic(store.fs, store.path(folder, "ledger", f"{name}.parquet"), b"entry")

    def commit(self, store: Store, lease: Lease, teacher: int, files: int) -> None:
        for _ in range(files):
            self.make_file(store, lease, teacher)
        made_by = TEACHERS[teacher]
        keys = data_keys(store, made_by, latest_of(store, made_by.digest))
        entries = []
        for key in keys:
            content = store.fs.cat_file(store.path(key))
            digest = hashlib.sha256(content).hexdigest()
            entries.append(
                ManifestFile(
                    key=key,
                    bytes=len(content),
                    sha256=digest,
                    rows=1,
                    row_groups=(1,),
                )
            )
        if not entries:
            return
        body = ManifestBody(
            schema_version=SCHEMA_VERSION,
            created_by={},
            fingerprint=made_by.as_dict(),
            fingerprint_digest=made_by.digest,
            prompts_digest=str(self.files),
            files=tuple(entries),
            excluded_files=(),
            rejected_ids=(),
            rows=len(entries),
            statistics={},
            fence=lease.fence,
        )
        made = commit_manifest(store, body, lease)
        found = load_manifest(self.root, made.version)  # what was reported is there for all
        assert found == made

    def collect(self, store: Store, lease: Lease) -> None:
        versions = list_versions(self.root)
        self.given_up |= set(versions[:-KEEP]) - set(self.pins.values())
        collect_garbage(store, lease, keep=KEEP)

    def pin(self, store: Store, name: str) -> None:
        versions = list_versions(self.root)
        if versions:
            self.pins.pop(name, None)
            with suppress(ManifestError):  # collected since it was listed
                pin_versions(store, name, versions[:1], holder="a test", created="now")
                self.pins[name] = versions[0]

    # ------------------------------------------------------------ what is promised

    @invariant()
    def look(self) -> None:
        versions, numbers = list_versions(self.root), log_numbers(self.root)
        assert max(numbers, default=0) >= self.highest
        for version in versions:
            content = self.root.fs.cat_file(self.root.path("manifests", f"{version:06d}.json"))
            manifest = load_manifest(self.root, version)
            if version not in self.seen:
                assert version > self.highest, "a number was given twice, or out of order"
                assert manifest.fence >= self.floor, "a writer that had lost its lease committed"
            assert self.seen.setdefault(version, content) == content, "a version has changed"
            for file in manifest.files:
                path = self.root.path(file.key)
                assert self.root.fs.exists(path), f"version {version} names a missing file {path}"
                assert hashlib.sha256(self.root.fs.cat_file(path)).hexdigest() == file.sha256
        self.highest = max(numbers, default=0)
        missing = set(self.seen) - set(versions)
        assert missing <= self.given_up, "a version is lost"
        assert not missing & set(self.pins.values()), "a pinned version is lost"
        assert not missing & set(sorted(self.seen)[-KEEP:]), "one of the newest versions is lost"

    # ------------------------------------------------------------ steps

    @rule(turn=turns)
    def take_the_lease(self, turn) -> None:
        self.run(self.take_over, turn)

    @rule(teacher=teachers, files=st.integers(0, 2), turn=turns, back=st.integers(1, 2))
    def commit_a_version(self, teacher, files, turn, back) -> None:
        lease = self.leases[-back:][0]
        self.run(lambda store: self.commit(store, lease, teacher, files), turn)

    @rule(teacher=teachers, back=st.integers(1, 2))
    def leave_files_unsealed(self, teacher, back) -> None:
        self.make_file(self.root, self.leases[-back:][0], teacher)

    @rule(turn=turns, back=st.integers(1, 2))
    def collect_the_old(self, turn, back) -> None:
        lease = self.leases[-back:][0]
        self.run(lambda store: self.collect(store, lease), turn)

    @rule(name=st.sampled_from(("reader", "trainer")), turn=turns)
    def pin_the_oldest(self, name, turn) -> None:
        self.run(lambda store: self.pin(store, name), turn)

    @precondition(lambda self: self.pins)
    @rule(turn=turns)
    def unpin_one(self, turn) -> None:
        name, _ = self.pins.popitem()
        self.run(lambda store: unpin(store, name), turn)


def _leave(holding: AbstractContextManager) -> None:
    with suppress(Killed, OSError):
        holding.__exit__(None, None, None)


class OnDisk(VersionLog):
    def make_store(self) -> Store:
        return open_store(self.stack.enter_context(tempfile.TemporaryDirectory()))


class InMemory(VersionLog):
    """An object store whose every request is atomic."""

    def make_store(self) -> Store:
        fs = MemoryFileSystem(skip_instance_cache=True)
        fs.store, fs.pseudo_dirs = {}, [""]
        return Store(fs, "/set")


budget = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    database=None,
    print_blob=True,
    phases=(Phase.generate,),  # to make a failing history shorter takes minutes
)
TestOnDisk = OnDisk.TestCase
TestOnDisk.settings = budget
TestInMemory = InMemory.TestCase
TestInMemory.settings = settings(budget, max_examples=80)


# ---------------------------------------------------------------- every single moment


def grown_log(history: Sequence[int]) -> VersionLog:
    """Versions by these teachers, more than are kept, and files that no version names yet."""
    log = InMemory()
    for teacher in history:
        log.commit(log.root, log.leases[-1], teacher, 1)
        log.look()
    for teacher in (0, 1):
        log.make_file(log.root, log.leases[-1], teacher)
    return log


MIXED = (0, 1, 0, 1, 0)
ABANDONED = (0, 0, 0, 1, 1)  # nothing of the first generation is kept
LONGEST = 80
PROGRAMS = {
    "take the lease": lambda log, lease, store: log.take_over(store),
    "commit": lambda log, lease, store: log.commit(store, lease, 0, 1),
    "collect": lambda log, lease, store: log.collect(store, lease),
    "pin": lambda log, lease, store: log.pin(store, "trainer"),
}


def disturbed(program: str, history: Sequence[int], *turns: tuple[int, str]) -> bool:
    """Run one program on a grown log, then all that comes after; were all the turns taken?"""
    log = grown_log(history)
    try:
        lease = log.leases[-1]
        gate = log.run(lambda store: PROGRAMS[program](log, lease, store), *turns)
        log.take_over()
        log.commit(log.root, log.leases[-1], 0, 1)
        log.look()
        log.collect(log.root, log.leases[-1])
        log.look()
        return len(gate.hits) == len(turns)
    finally:
        log.teardown()


@pytest.mark.parametrize("what", ["kill", "fail before", "fail after", *OTHERS])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_disturbed_at_any_operation_breaks_no_promise(program, what):
    for history in (MIXED, ABANDONED):
        moment = 0
        while disturbed(program, history, (moment, what)):
            moment += 1
        assert moment > 1


@pytest.mark.chaos
def test_a_version_pinned_while_its_collector_dies_is_there():
    for pinned in range(LONGEST):
        killed = pinned + 1
        while disturbed("collect", MIXED, (pinned, "pin"), (killed, "kill")):
            killed += 1
        if killed == pinned + 1:
            return
    pytest.fail(f"to collect took more than {LONGEST} operations")
