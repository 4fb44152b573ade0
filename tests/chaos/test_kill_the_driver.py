"""The driver is killed (SIGKILL) at random instants; the same command goes on each time."""

import random
import time
from pathlib import Path

import pytest

from tests.chaos.driver import Driver
from tests.chaos.whole import assert_whole

PROMPTS, BLOCK = 240, 8
KILLS = 3
BLOCK_S = 0.5  # about how long a block takes


def random_kills(driver: Driver, kills: int, seed: int) -> list[str]:
    """Kill it `kills` times; the phases that were hit, printed with the seed."""
    print(f"seed {seed}")
    rng, phases = random.Random(seed), []
    while len(phases) < kills:
        before, versions = driver.committed_rows(), driver.versions()
        driver.start()
        # Somewhere in the first half of what is left, and then at any moment of a block.
        target = before + max(1, int(rng.random() * (PROMPTS - before) / 2))
        driver.wait_until(lambda target=target: driver.committed_rows() >= target)
        instant = time.monotonic() + rng.uniform(0, 2 * BLOCK_S)
        if not driver.wait_until(lambda instant=instant: time.monotonic() >= instant):
            print(f"finished before kill {len(phases) + 1}")
            break
        driver.kill()
        phases.append(driver.phase(PROMPTS, versions))
        print(f"kill {len(phases)}: {phases[-1]}, {driver.committed_rows()} rows committed")
    return phases


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_driver_killed_at_random_instants_leaves_a_whole_data_set(
    tiny_teacher_dir, tmp_path: Path
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {index}" for index in range(PROMPTS)))
    settings = {
        "run.dir": tmp_path / "run", "teacher.path": tiny_teacher_dir, "pairs.prompts": prompts,
        "pairs.steps": 60, "pairs.rows_per_block": BLOCK,
    }  # fmt: skip
    with Driver(settings, tmp_path / "set", tmp_path / "driver.log") as driver:
        phases = random_kills(driver, KILLS, seed=random.SystemRandom().randrange(1 << 30))
        assert phases
        kept = driver.committed_rows()
        summary = driver.finish()
        assert_whole(driver.root, PROMPTS)
        assert driver.committed_rows() == PROMPTS, "rows in the ledger were made twice"
        print(f"the last run: {summary} after {kept} rows were kept")
        again = driver.finish()
        assert again["version"] == summary["version"] and not again["generated"]
