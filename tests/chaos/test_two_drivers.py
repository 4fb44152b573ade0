"""Two drivers of one data set: at the same moment, and one that was frozen past its lease."""

import signal
from pathlib import Path

import pytest

from tests.chaos.driver import Driver
from tests.chaos.whole import assert_whole, landed_table_ids, sealed_manifests, stored_ids

PROMPTS, BLOCK = 48, 8
LEASE_S = 3


def drivers(teacher: str, folder: Path, **settings: object) -> tuple[Driver, Driver]:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {index}" for index in range(PROMPTS)))
    common = {
        "teacher.path": teacher, "pairs.prompts": prompts, "pairs.rows_per_block": BLOCK,
        "pairs.lease_seconds": LEASE_S, "pairs.steps": 30, **settings,
    }  # fmt: skip
    first, second = (
        Driver(common | {"run.dir": folder / name}, folder / "set", folder / f"{name}.log")
        for name in ("first", "second")
    )
    return first, second


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_of_two_drivers_at_the_same_moment_one_works_and_the_other_hears_who(
    tiny_teacher_dir, tmp_path
):
    first, second = drivers(tiny_teacher_dir, tmp_path)
    with first, second:
        pids = {}
        for driver in (first, second):
            driver.start()
            assert driver.process is not None
            pids[driver.log] = driver.process.pid
        codes = {driver.log: driver.wait()[0] for driver in (first, second)}
        print(codes)
        newest = assert_whole(first.root, PROMPTS)
        assert newest["version"] == 1 and len(sealed_manifests(first.root)) == 1
        assert first.committed_rows() == PROMPTS, "work was done twice"
        stories = "\n".join(log.read_text()[-2000:] for log in codes)
        assert sorted(codes.values()) in ([0, 4], [0, 0]), stories
        if 4 in codes.values():
            (loser,) = (log for log, code in codes.items() if code == 4)
            (winner,) = (log for log, code in codes.items() if code == 0)
            assert f"is being written by process {pids[winner]} on" in loser.read_text()
        else:
            assert any("nothing to do" in log.read_text() for log in codes)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_driver_frozen_past_its_lease_is_followed_and_gives_up_when_it_thaws(
    tiny_teacher_dir, tmp_path
):
    first, second = drivers(tiny_teacher_dir, tmp_path)
    with first, second:
        first.start()
        assert first.wait_until(lambda: first.committed_rows() >= BLOCK)
        first.signal_all(signal.SIGSTOP)
        try:
            kept = first.committed_rows()
            assert kept < PROMPTS, "nothing was left to do"
            summary = second.finish()
            newest = assert_whole(second.root, PROMPTS)
            log = sorted(path.name for path in first.root.glob("manifests/*.json"))
        finally:
            first.signal_all(signal.SIGCONT)
        code, _ = first.wait()
        story = first.log.read_text()
        print(f"{kept} rows when it froze; exit code {code}: {story[-400:]}")
        assert code == 4 and "has lost its lease 1 (lease 2 was taken by process" in story
        assert sorted(path.name for path in first.root.glob("manifests/*.json")) == log
        assert sealed_manifests(first.root) == [newest] and newest["version"] == summary["version"]
        assert stored_ids(first.root, newest) == landed_table_ids(
            first.root, newest["prompts_digest"]
        )
        again = second.finish()
        assert again["version"] == summary["version"] and not again["generated"]
        assert_whole(first.root, PROMPTS)
