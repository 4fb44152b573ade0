"""Collecting deletes what no kept version and no pin needs, and nothing else."""

import json
from contextlib import contextmanager

import numpy as np
import pytest

from dmd_core.files import write_atomic
from pipelines import collect as module
from pipelines.batches import PairReader
from pipelines.collect import collect_garbage, needs_collecting
from pipelines.dataset_pins import intent_path, pin_name, pin_versions, read_pins, unpin
from pipelines.lease import LeaseLostError, hold_lease
from pipelines.ledger import finished_ids
from pipelines.manifest import (
    NoSuchVersionError,
    commit_manifest,
    list_versions,
    load_manifest,
    log_numbers,
    void_next_number,
)
from pipelines.seal import seal_generation
from pipelines.storage import open_store
from tests.pipelines.made_pairs import FINGERPRINT, land_ids, write_file
from tests.pipelines.test_manifest import body


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3_store")
    return open_store(str(tmp_path / "set"))


@contextmanager
def leased(root):
    with hold_lease(root, period_s=30, purpose="a test", void_next=void_next_number) as lease:
        yield lease


def collect(root, keep):
    with leased(root) as lease:
        return collect_garbage(root, lease, keep=keep)


def seal(root, ids, fingerprint=FINGERPRINT, name=None):
    """One more version: of a new file `name` with `ids`, and of all files before it."""
    if name:
        write_file(root, f"{name}-0.parquet", ids, fingerprint=fingerprint)
    return seal_generation(root, fingerprint, land_ids(root, ids))


def run(root, new, fingerprint=FINGERPRINT, asked=None):
    """A run that makes the rows `new` under a lease of its own; killed before it seals, unless the
    rows `asked` for are given."""
    with leased(root) as lease:
        name = f"{lease.fence:06d}_w_000000"
        write_file(root, f"{name}-0.parquet", new, fingerprint=fingerprint)
        if asked is not None:
            seal_generation(root, fingerprint, land_ids(root, asked), lease=lease)
    return name


def files_of(root, fingerprint, part):
    return stored(root.at(fingerprint.folder, part))


def other(steps):
    from dataclasses import replace

    return replace(FINGERPRINT, steps=steps)


def stored(root):
    return sorted(path.removeprefix(root.root + "/") for path in root.fs.find(root.root))


def assert_readable(root):
    """Every version that exists can be read to its last row."""
    for version in list_versions(root):
        manifest = load_manifest(root, version)
        reader = PairReader(root, manifest, seed=0, verify=True)
        assert len(reader.rows(np.arange(manifest.rows))) == manifest.rows


def test_the_newest_versions_stay_and_the_files_of_the_others_go(root):
    for steps in (1, 2, 3, 4):
        seal(root, range(steps + 3), other(steps), name=f"w{steps}_0")
    assert needs_collecting(root, 2) and not needs_collecting(root, 4)
    collected = collect(root, 2)
    assert collected.versions == (1, 2) and list_versions(root) == [3, 4]
    assert not needs_collecting(root, 2)
    left = stored(root)
    for steps in (1, 2):
        assert not [path for path in left if path.startswith(other(steps).folder)]
    assert len([path for path in left if path.startswith("prompts/")]) == 2
    assert_readable(root)
    # Nothing more to do, and no number is used twice.
    assert collect(root, 2).files == 0
    assert seal(root, range(9), other(5), name="w5_0").version == 5


def test_a_pinned_version_stays_until_it_is_unpinned(root):
    for steps in (1, 2, 3):
        seal(root, range(4), other(steps), name=f"w{steps}_0")
    name = pin_name("s3://bucket/runs/a run")
    pin_versions(root, name, [1], holder="a test", created="now")
    assert read_pins(root)[name].versions == (1,)
    assert collect(root, 1).versions == (2,)
    assert list_versions(root) == [1, 3]
    assert_readable(root)
    unpin(root, name)
    assert collect(root, 1).versions == (1,) and list_versions(root) == [3]
    with pytest.raises(NoSuchVersionError, match="no such version"):
        pin_versions(root, name, [1], holder="a test", created="now")


@pytest.mark.parametrize("moment", ["before", "intent", "dropped"])
def test_a_reader_keeps_it_or_hears_that_it_goes(root, monkeypatch, moment):
    """Whenever a reader pins an old version: either it stays, or the pin is refused."""
    seal(root, range(4), other(1), name="w1_0")
    seal(root, range(4), other(2), name="w2_0")
    refused = []

    def pin():
        try:
            pin_versions(root, "reader", [1], holder="a test", created="now")
        except NoSuchVersionError as error:
            refused.append(str(error))
            unpin(root, "reader")

    before = {"before": None, "intent": "_unpinned", "dropped": "_collect_prompts"}[moment]
    if before is None:
        pin()
    else:
        run = getattr(module, before)
        monkeypatch.setattr(module, before, lambda *a, **k: (pin(), run(*a, **k))[1])
    dropped = collect(root, 1).versions
    assert bool(refused) == (before is not None) and dropped == ((1,) if refused else ())
    assert (1 in list_versions(root)) != bool(refused)
    assert_readable(root)


def test_who_has_pinned_a_version_pins_it_again_whatever_a_collector_means_to_do(root):
    """A training that follows the set pins all it has read, and more, at each switch."""
    for steps in (1, 2, 3):
        seal(root, range(4), other(steps), name=f"w{steps}_0")
    pin_versions(root, "reader", [1], holder="a test", created="now")
    write_atomic(root.fs, intent_path(root), json.dumps({"versions": [1, 2]}).encode())
    pin_versions(root, "reader", [1, 3], holder="a test", created="later")
    with pytest.raises(NoSuchVersionError, match="version 2 is being collected"):
        pin_versions(root, "reader", [1, 2, 3], holder="a test", created="too late")
    assert read_pins(root)["reader"].versions == (1, 3)  # as it was


def test_a_collector_that_was_killed_is_followed_by_one_that_ends_its_work(root, monkeypatch):
    for steps in (1, 2, 3):
        seal(root, range(4), other(steps), name=f"w{steps}_0")

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "_collect_generation", die)
        with pytest.raises(Killed):
            collect(root, 1)
    assert list_versions(root) == [3] and needs_collecting(root, 1)
    assert collect(root, 1).files > 0 and not needs_collecting(root, 1)
    assert not [path for path in stored(root) if path.startswith(other(1).folder)]


def test_what_is_no_record_of_prompts_is_left_alone(root):
    """Of a process that was killed while it wrote one, or of a file browser."""
    strays = [
        root.path("prompts", "sources", name) for name in (f"{'a' * 64}.json.0f.tmp", ".DS_Store")
    ]
    for steps in (1, 2):
        seal(root, range(4), other(steps), name=f"w{steps}_0")
        for path in strays:
            write_atomic(root.fs, path, b"")
    collect(root, 1)
    assert not needs_collecting(root, 1) and all(map(root.fs.exists, strays))
    assert_readable(root)


def test_unfinished_work_and_rows_that_may_come_back_are_not_touched(root):
    write_file(root, "w0_0-0.parquet", range(7), fingerprint=other(9))  # never sealed
    seal(root, range(6), name="w1_0")
    seal(root, range(3), name=None)  # rows 3 to 5 are retired
    unfinished = stored(root.at(other(9).folder))
    collect(root, 1)
    assert stored(root.at(other(9).folder)) == unfinished
    again = seal(root, range(6), name=None)
    assert again.rows == 6 and again.version == 3
    assert_readable(root)


def test_a_file_that_no_version_knows_goes_with_its_ledger_entry_first(root, monkeypatch):
    first = run(root, range(4), asked=range(4))
    second = run(root, range(4, 6), asked=range(6))
    # Written under the first lease by somebody who was thought dead.
    write_file(root, f"{first[:6]}_thawed_000000-0.parquet", [1, 2])
    deleted = []
    delete = module.delete_if_there
    monkeypatch.setattr(
        module, "delete_if_there", lambda s, p: (deleted.append(p.split("/")[-2]), delete(s, p))
    )
    assert collect(root, 1).files == 3  # these two, and the prompts of the old version
    assert [part for part in deleted if part in ("ledger", "data")] == ["ledger", "data"]
    assert files_of(root, FINGERPRINT, "data") == [f"{name}-0.parquet" for name in (first, second)]
    assert_readable(root)


def test_rows_that_a_killed_run_finished_wait_for_the_next_one(root):
    """A version, a run that is killed before it seals, then another sampler in the same root."""
    run(root, range(4), asked=range(4))
    unsealed = run(root, range(4, 6))
    run(root, range(4), other(9), asked=range(4))
    collect(root, 2)
    assert f"{unsealed}-0.parquet" in files_of(root, FINGERPRINT, "data")
    assert sorted(finished_ids(root, FINGERPRINT.folder)) == list(range(6))
    assert seal(root, range(6)).rows == 6
    assert_readable(root)


def test_unsealed_rows_outlive_every_version_of_their_generation(root):
    run(root, range(4), asked=range(4))
    unsealed = run(root, range(4, 6))
    for steps in (7, 8):
        run(root, range(4), other(steps), asked=range(4))
    for _ in range(2):  # what is left is unfinished work, which the next collector leaves alone
        collect(root, 1)
        assert files_of(root, FINGERPRINT, "data") == [f"{unsealed}-0.parquet"]
        assert sorted(finished_ids(root, FINGERPRINT.folder)) == [4, 5]
    assert not files_of(root, other(7), "data")
    assert_readable(root)


def test_what_only_a_dropped_version_named_goes_though_an_older_one_is_pinned(root):
    first = run(root, range(4), asked=range(4))
    run(root, range(4, 6), asked=range(6))
    run(root, range(4), other(9), asked=range(4))
    pin_versions(root, "reader", [1], holder="a test", created="now")
    assert collect(root, 1).versions == (2,)
    assert files_of(root, FINGERPRINT, "data") == [f"{first}-0.parquet"]
    assert_readable(root)
    unpin(root, "reader")
    collect(root, 1)
    assert not files_of(root, FINGERPRINT, "")


def test_numbers_are_void_for_long_before_they_are_forgotten(root, monkeypatch):
    monkeypatch.setattr(module, "_KEPT_NUMBERS", 2)
    for number in range(5):
        void_next_number(root, number, "taken over")
        commit_manifest(root, body())
    collect(root, 1)
    assert list_versions(root) == [10] and log_numbers(root) == [8, 9, 10]
    assert commit_manifest(root, body()).version == 11


def test_who_has_lost_the_lease_deletes_nothing(root):
    for steps in (1, 2):
        seal(root, range(4), other(steps), name=f"w{steps}_0")
    before = stored(root)
    with leased(root) as lease:
        write_atomic(root.fs, root.path("leases", "000009.json"), json.dumps({}).encode())
        with pytest.raises(LeaseLostError):
            collect_garbage(root, lease, keep=1)
        assert [p for p in before if p not in stored(root)] == []


def test_a_pin_that_cannot_be_read_stops_the_collector(root):
    from pipelines.commits import StoreError

    for steps in (1, 2):
        seal(root, range(4), other(steps), name=f"w{steps}_0")
    write_atomic(root.fs, root.path("pins", "x.json"), b'{"versions": "all"}')
    with pytest.raises(StoreError, match=r"pins/x\.json is not a pin"):
        collect(root, 1)
    assert list_versions(root) == [1, 2]
