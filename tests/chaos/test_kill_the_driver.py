"""The driver of `dmd regenerate` is killed (SIGKILL) at random instants; prompts change meanwhile.

After each kill two questions are asked, of the ids that teachers noted before they began a batch.
Was a row begun that the ledger held already? Then work was done twice. And how many of the rows
that were begun are not in the ledger now? Those are lost to the kill: `IN_FLIGHT` blocks at most,
which are the two that the one teacher has, for its next block is fetched while it works, and those
whose writing runs, one task for each other logical CPU.

A run with the environment variable DMD_CHAOS_SEED=<seed> aims as the one that printed the seed.
"""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.chaos.driver import Driver
from tests.chaos.whole import (
    assert_settled,
    assert_whole,
    landed_table_ids,
    sealed_manifests,
    stored_ids,
)

PROMPTS, NEW, BLOCK, CPUS = 240, 120, 4, 4
IN_FLIGHT = 2 + (CPUS - 1)
KILLS = 10  # after the first block of a run
STARTS = 24
STEPS = 20
# What a kill waits for, and how likely: then it comes somewhere within so many seconds.
STAGES = {"lease": 1, "block": 6, "sealing": 2, "collecting": 2}
SPREAD_S = {"lease": 1, "block": 2, "sealing": 0.5, "collecting": 0.2}


class Order:
    """The prompt file: with every change, `NEW` prompts go and as many others come."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, -1
        self.change()

    def change(self) -> None:
        self.number += 1
        first = self.number * NEW
        self.path.write_text("\n".join(f"prompt {i}" for i in range(first, first + PROMPTS)))


@dataclass
class Rows:
    """What a data set's ledger holds, and what its teachers have begun; `look` after each run."""

    root: Path
    ledger: set[int] = field(default_factory=set)
    _seen: int = 0

    def look(self) -> tuple[list[int], set[int]]:
        """(rows that were begun since the last look, those of them that are not in the ledger)."""
        begun = self._begun()
        new, self._seen = begun[self._seen :], len(begun)
        again = self.ledger.intersection(new)
        assert not again, f"{len(again)} rows that the ledger held were made again"
        assert len(new) == len(set(new)), "rows were made twice in one run"
        self.ledger = self._in_ledger()
        return new, set(new) - self.ledger

    def _begun(self) -> list[int]:
        path = Path(f"{self.root}.begun")
        lines = path.read_text().splitlines() if path.exists() else []
        return [pair_id for line in lines for pair_id in map(int, line.strip("[]").split(","))]

    def _in_ledger(self) -> set[int]:
        entries = self.root.glob("generations/*/ledger/*.parquet")
        finished = [entry for entry in entries if ".pending." not in entry.name]
        ids = [i for entry in finished for i in pq.read_table(entry)["pair_id"].to_pylist()]
        assert len(ids) == len(set(ids)), "rows are in the ledger twice"
        return set(ids)


def reached(driver: Driver, stage: str) -> Callable[[], bool]:
    """A condition: the start of the driver that comes next has come to `stage`."""
    root, rows = driver.root, driver.committed_rows()
    fence, version = newest_fence(root), newest_version(root)

    def look() -> bool:
        if newest_fence(root) == fence:
            return False
        if stage == "block":
            return driver.committed_rows() > rows
        if stage == "collecting":
            return (root / "collecting.json").exists() or newest_version(root) > version
        return stage == "lease" or driver.beat_phase() in (stage, "collecting")

    return look


def pause(driver: Driver, seconds: float) -> bool:
    """Is the driver still there after so many seconds?"""
    end = time.monotonic() + seconds
    driver.wait_until(lambda: time.monotonic() >= end)
    return driver.process is not None and driver.process.poll() is None


def newest_fence(root: Path) -> int:
    return max((int(path.stem) for path in root.glob("leases/*.json")), default=0)


def newest_version(root: Path) -> int:
    return max((manifest["version"] for manifest in sealed_manifests(root)), default=0)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_driver_killed_at_random_instants_leaves_a_whole_data_set(
    tiny_teacher_dir, tmp_path: Path, capsys
):
    seed = int(os.environ.get("DMD_CHAOS_SEED") or random.SystemRandom().randrange(1 << 30))
    rng, order = random.Random(seed), Order(tmp_path / "prompts.txt")

    def say(text: str) -> None:
        with capsys.disabled():  # seen in a green run, too
            print(f"\nDMD_CHAOS_SEED={seed}: {text}", end="", flush=True)

    settings = {
        "run.dir": tmp_path / "run", "teacher.path": tiny_teacher_dir,
        "pairs.prompts": order.path, "pairs.steps": STEPS, "pairs.rows_per_block": BLOCK,
        "pairs.batch_size": BLOCK, "pairs.lease_seconds": 2, "pairs.keep_versions": 1,
        "ray.num_cpus": CPUS,
    }  # fmt: skip
    root, log = tmp_path / "set", tmp_path / "log"
    with Driver(settings, root, log, "regenerate", "tests.chaos.counting") as driver:
        rows, kills, starts = Rows(root), 0, 0
        while kills < KILLS and starts < STARTS:
            starts += 1
            version = newest_version(root)
            (stage,) = rng.choices(list(STAGES), list(STAGES.values()))
            there = reached(driver, stage)
            driver.start()
            alive = driver.wait_until(there) and pause(driver, rng.uniform(0, SPREAD_S[stage]))
            collecting = (root / "collecting.json").exists()  # no beat may tell of so short a time
            hit = "collecting" if collecting else driver.beat_phase() or "landing"
            driver.kill()
            half, (begun, lost) = driver.half_written(), rows.look()
            what = "ended before its kill"
            if alive:
                counts = bool(begun) or hit in ("sealing", "collecting")
                kills += counts
                what = f"kill {kills} of {KILLS}" if counts else "kill before a block"
            say(
                f"{what}, aimed at {stage}, hit {hit}, {half} writes cut off: {len(begun)} rows "
                f"begun, {len(lost)} of them lost, {len(rows.ledger)} in the ledger"
            )
            assert len(lost) <= (IN_FLIGHT * BLOCK if alive else 0)
            if newest_version(root) > version or not alive:
                order.change()
        assert kills == KILLS, f"only {kills} in {STARTS} starts"
        summary = driver.finish()
        rows.look()
        newest = assert_whole(root, PROMPTS)
        assert_settled(root)
        assert stored_ids(root, newest) == landed_table_ids(root, newest["prompts_digest"])
        assert driver.versions() == 1
        again = driver.finish()
        assert again["version"] == summary["version"] and not again["generated"]
