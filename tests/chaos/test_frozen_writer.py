"""A writer freezes at a named point past the end of its lease; another works; the first thaws."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.chaos.stand_in import POINTS, SAMPLES, freeze_in_process
from tests.chaos.whole import assert_whole, landed_table_ids, sealed_manifests, stored_ids

BEFORE, AFTER = ["a red fox", "a blue whale"], ["a red fox", "a green apple", "a flag"]
NAMES = list(POINTS)
# Before it takes the lease there is none to lose; nor is there after its last look at it.
FIRST, LAST = NAMES.index("take the lease"), NAMES.index("remove the intent")
SEALED = NAMES.index("create the manifest")


def moments():
    for index, name in enumerate(NAMES[:LAST]):
        for after in (False, True):
            if index == FIRST + 1 or (index, after) == (FIRST, False):
                continue  # nothing is taken over, so no number is made void
            yield name, after, False
            if (index, after) > (SEALED, False):  # else the old order is what is there
                yield name, after, True


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    (folder / "before.txt").write_text("\n".join(BEFORE))
    (folder / "after.txt").write_text("\n".join(AFTER))
    assert ended(start(folder, "before.txt", False)) == 0
    return folder


def start(folder: Path, prompts: str, *arguments: object):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.chaos.stand_in"])
    arguments = (str(folder / "set"), str(folder / prompts), *arguments)
    process = context.Process(target=freeze_in_process, args=arguments)
    process.start()
    return process


def ended(process) -> int | None:
    process.join(120)
    code = process.exitcode
    process.kill()
    return code


def wait_until_frozen(process) -> None:
    deadline = time.monotonic() + 60
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.chaos
@pytest.mark.parametrize(("name", "after", "back"), moments())
def test_a_writer_that_thaws_at_a_named_point_spoils_nothing(begun, tmp_path, name, after, back):
    """The second run has the first one's order, or the one that the old version had."""
    folder = tmp_path / "copy"
    shutil.copytree(begun, folder)
    frozen = start(folder, "after.txt", True, name, after)
    try:
        wait_until_frozen(frozen)
        second = ("before.txt", False) if back else ("after.txt", True)
        assert ended(start(folder, *second)) == 0
        newest = sealed_manifests(folder / "set")[-1]
    finally:
        os.kill(frozen.pid, signal.SIGCONT)
        code = ended(frozen)
    assert code == 4, code
    assert "this process has lost its lease" in (folder / "set.error").read_text()
    rows = SAMPLES * len(BEFORE if back else AFTER)
    if name == "old table's deletion" and back:  # the table is missed, and landed again
        assert ended(start(folder, *second)) == 0
    assert assert_whole(folder / "set", rows) == newest, "the thawed writer changed the log"
    assert stored_ids(folder / "set", newest) == landed_table_ids(
        folder / "set", newest["prompts_digest"]
    )
    # What it left behind is in nobody's way: the next run ends with a whole set, and the last word.
    assert ended(start(folder, "after.txt", True)) == 0
    assert_whole(folder / "set", SAMPLES * len(AFTER))
