"""The driver of `dmd regenerate` is killed (SIGKILL) at random instants; prompts change meanwhile.

How many rows may be made twice? A row counts as handled when its batch leaves the teacher, and is
kept when the ledger entry of its block has its final name. In between are: the block in the one
actor, and blocks whose writing waits or runs. Ray Data starts at most one writing task for each of
the other logical CPUs, so at most `CPUS` blocks are lost to one kill.
"""

import json
import random
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.chaos.driver import Driver
from tests.chaos.whole import assert_settled, assert_whole, landed_table_ids, stored_ids

PROMPTS, NEW, BLOCK, CPUS = 48, 24, 8, 4
KILLS = 10
STEPS = 30
# What a kill waits for, and how likely: then it comes somewhere within the next second.
STAGES = {"lease": 2, "block": 5, "sealing": 2, "collecting": 2}


class Order:
    """The prompt file: with every change, `NEW` prompts go and as many others come."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, -1
        self.change()

    def change(self) -> None:
        self.number += 1
        first = self.number * NEW
        self.path.write_text("\n".join(f"prompt {i}" for i in range(first, first + PROMPTS)))


def reached(driver: Driver, stage: str, fence: int, rows: int):
    """A condition: the newest start of the driver has come to `stage`."""

    def look() -> bool:
        if not (driver.root / f"leases/{fence + 1:06d}.json").exists():
            return False
        if stage == "block":
            return driver.committed_rows() > rows
        if stage == "collecting":
            return (driver.root / "collecting.json").exists()
        return stage == "lease" or driver.beat_phase() in (stage, "collecting")

    return look


def newest_fence(root: Path) -> int:
    return max((int(path.stem) for path in root.glob("leases/*.json")), default=0)


@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_a_driver_killed_at_random_instants_leaves_a_whole_data_set(
    tiny_teacher_dir, tmp_path: Path
):
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    rng, order = random.Random(seed), Order(tmp_path / "prompts.txt")
    settings = {
        "run.dir": tmp_path / "run", "teacher.path": tiny_teacher_dir,
        "pairs.prompts": order.path, "pairs.steps": STEPS, "pairs.rows_per_block": BLOCK,
        "pairs.lease_seconds": 2, "pairs.keep_versions": 1, "ray.num_cpus": CPUS,
    }  # fmt: skip
    with Driver(settings, tmp_path / "set", tmp_path / "log", "regenerate") as driver:
        kills, ended = 0, 0
        while kills < KILLS and ended < KILLS:
            fence, versions, rows = newest_fence(driver.root), driver.versions(), committed(driver)
            (stage,) = rng.choices(list(STAGES), list(STAGES.values()))
            driver.start()
            there = driver.wait_until(reached(driver, stage, fence, rows))
            instant = time.monotonic() + rng.uniform(0, 1)
            if not there or not driver.wait_until(lambda t=instant: time.monotonic() >= t):
                ended += 1
                print(f"ended before it was killed ({stage})")
                driver.kill()
                order.change()
                continue
            said = driver.beat_phase()
            driver.kill()
            kills += 1
            phase = driver.phase(committed(driver) + 1, versions)
            print(f"kill {kills}: aimed at {stage}, hit {said or 'landing'} ({phase})")
            if driver.versions() > versions:
                order.change()
        assert kills == KILLS, f"only {kills}"
        summary = driver.finish()
        newest = assert_whole(driver.root, PROMPTS)
        assert_settled(driver.root)
        assert stored_ids(driver.root, newest) == landed_table_ids(
            driver.root, newest["prompts_digest"]
        )
        assert driver.versions() == 1
        stored, handled = unique_committed(driver), rows_handled(driver.root)
        print(f"{handled} rows handled in runs, {stored} in the ledger, {kills} kills")
        assert handled - stored <= kills * CPUS * BLOCK
        again = driver.finish()
        assert again["version"] == summary["version"] and not again["generated"]


def committed(driver: Driver) -> int:
    return driver.committed_rows()


def unique_committed(driver: Driver) -> int:
    """Rows in the ledger, none of them twice."""
    entries = driver.root.glob("generations/*/ledger/*.parquet")
    ids = [i for entry in entries for i in pq.read_table(entry)["pair_id"].to_pylist()]
    assert len(ids) == len(set(ids)), "rows in the ledger were made again"
    return len(ids)


def rows_handled(root: Path) -> int:
    """By teachers, in all runs; what a killed run did after its last beat is not in it."""
    records = [json.loads(path.read_text()) for path in root.glob("generations/*/runs/*.json")]
    return sum(record["rows"] for record in records)
