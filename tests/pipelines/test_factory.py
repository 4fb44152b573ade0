"""What the factory does about files that are gone or damaged, and what it says a set has cost."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.commits import StoreError
from pipelines.factory import order_changes
from pipelines.inspection import inspect_dataset
from pipelines.lease import newest_fence
from pipelines.seal import SealError
from pipelines.storage import open_store
from tests.chaos.stand_in import SAMPLES, order_of, regenerate, write
from tests.chaos.whole import assert_whole
from tests.pipelines.made_pairs import FINGERPRINT, made_table

ROWS = 3 * SAMPLES


class Factory:
    """A sealed set of three prompts, which stand-ins for teachers make anew where they must."""

    def __init__(self, folder: Path) -> None:
        self.root, self.prompts = open_store(str(folder / "set")), folder / "prompts.txt"
        self.prompts.write_text("a red fox\na blue whale\na flag")
        self.run()

    def run(self):
        return regenerate(self.root, str(self.prompts), FINGERPRINT, fenced=True)

    def to_make(self) -> int:
        return order_changes(order_of(self.root, str(self.prompts), FINGERPRINT)).to_make

    def files(self) -> list[Path]:
        return sorted(Path(self.root.path(FINGERPRINT.folder, "data")).glob("*.parquet"))

    def assert_whole(self, version: int) -> None:
        manifest = assert_whole(Path(self.root.root), ROWS)
        assert manifest["version"] == version and not inspect_dataset(self.root).problems


@pytest.fixture
def factory(tmp_path) -> Factory:
    return Factory(tmp_path)


def test_the_rows_of_a_file_that_is_gone_are_made_anew(factory):
    assert not factory.run().made and factory.to_make() == 0
    (lost, *kept) = factory.files()
    lost.unlink()
    assert factory.to_make() == SAMPLES
    outcome = factory.run()
    assert outcome.made and outcome.manifest.rows == ROWS
    assert set(kept) < set(factory.files()) and lost not in factory.files()
    factory.assert_whole(version=2)
    assert not factory.run().made and newest_fence(factory.root) == 2


def test_a_file_of_another_size_is_named_before_any_work_until_it_is_moved_away(factory):
    damaged = factory.files()[1]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    before = factory.files()
    advice = rf"{damaged.name} is not what version 1 was sealed with .*; move it away and run again"
    for prompts in (factory.prompts.read_text(), "a red fox\na blue whale\na flag\na green apple"):
        factory.prompts.write_text(prompts)
        with pytest.raises(SealError, match=advice):
            factory.run()
        with pytest.raises(SealError, match=advice):
            factory.to_make()
    assert factory.files() == before  # nothing was made that could not be sealed
    factory.prompts.write_text("a red fox\na blue whale\na flag")
    os.rename(damaged, f"{damaged}.bad")  # its name still begins like the ledger's entry
    assert factory.run().made
    factory.assert_whole(version=2)


def test_all_files_of_another_size_are_named_at_once(factory):
    first, second, _ = factory.files()
    for damaged in (first, second):
        damaged.write_bytes(b"")
    with pytest.raises(SealError, match=rf"{first.name} is not what .* 1 more: \S+{second.name}$"):
        factory.run()


def test_an_entry_that_cannot_be_read_is_named_until_it_is_moved_away(factory):
    folder = Path(factory.root.path(FINGERPRINT.folder, "ledger"))
    torn = sorted(folder.glob("*.parquet"))[1]
    torn.write_bytes(b"")
    factory.prompts.write_text("a red fox\na blue whale\na flag\na green apple")
    with pytest.raises(StoreError, match=rf"{torn.name}: cannot be read: .*move it away"):
        factory.run()
    torn.unlink()
    assert factory.to_make() == 2 * SAMPLES  # those of the entry, and the new ones


@pytest.mark.parametrize("others", [True, False])
def test_a_row_that_the_ledger_lists_and_no_file_holds_is_made(factory, others):
    """A node died between a ledger entry and its report; in the repeated block a row was rejected,
    and Ray kept the entry. With and without other rows to make."""
    ids = pq.read_table(factory.files()[0])["pair_id"].to_pylist()
    factory.files()[0].unlink()  # as if never sealed: no version is to name the file
    for manifest in Path(factory.root.path("manifests")).iterdir():
        manifest.unlink()
    folder = Path(factory.root.path(FINGERPRINT.folder, "ledger"))
    entry = next(e for e in folder.iterdir() if ids[0] in pq.read_table(e)["pair_id"].to_pylist())
    data = factory.root.path(FINGERPRINT.folder, "data", f"{entry.stem}-0.parquet")
    write(factory.root, data, made_table(ids[:1]))
    if others:
        factory.prompts.write_text("a red fox\na blue whale\na flag\na green apple")
    outcome = factory.run()
    assert outcome.manifest.rows == ROWS + SAMPLES * others and not outcome.manifest.rejected
    assert_whole(Path(factory.root.root), outcome.manifest.rows)


def test_the_cost_is_that_of_all_runs_of_the_generation(factory):
    """Of killed ones up to their last beat; what cannot be read of them counts nothing."""
    runs = Path(factory.root.path(FINGERPRINT.folder, "runs"))
    killed = {"fence": 7, "rows": 3, "busy_s": 4.0, "gpu_s": 2.0, "seconds": 9.0}
    (runs / "000007.json").write_text(json.dumps(killed))
    (runs / "000008.json").write_text(json.dumps(killed | {"busy_s": 1.5, "gpu_s": 0.0}))
    (runs / "000009.json").write_text("{")
    # Whole or torn, of a process that was killed while it replaced a record.
    (runs / "000008.json.0f.tmp").write_text(json.dumps(killed))
    (runs / "000007.json.0f.tmp").write_text("{")
    nothing = factory.run()
    assert not nothing.made and nothing.cost == {}
    found = nothing.cost_so_far
    assert (found.runs, found.gpu_s, found.cpu_s, found.busy_s) == (3, 2.0, 1.5, 5.5)
    problems = inspect_dataset(factory.root).problems
    assert len(problems) == 1 and "000009.json is not JSON" in problems[0]
    factory.prompts.write_text("a red fox")
    assert factory.run().cost_so_far.gpu_s == 2.0
