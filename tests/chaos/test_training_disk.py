"""`dmd train` onto a disk of its own that is really full. It is a small file system in memory,
which not everybody may mount."""

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dmd_core.checkpoint import Checkpoint, committed_steps, load_checkpoint
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import Store, open_store
from tests.chaos.training_here import EVERY, STEPS, assert_same, final, train_here, write_prompts

DISK_MB = 64

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def train(ray_cluster, tiny_teacher_dir, tmp_path_factory) -> Callable[[Store], int]:
    prompts = write_prompts(tmp_path_factory.mktemp("prompts"))
    return lambda root: train_here(root, tiny_teacher_dir, prompts)


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory) -> Checkpoint:
    root = open_store(str(tmp_path_factory.mktemp("plain")))
    assert train(root) == 0
    return final(root)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no right to mount a file system: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """To the last byte."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            while True:
                try:
                    if not file.write(bytes(size)):
                        break
                except OSError as error:
                    assert "No space left" in str(error)
                    break
    return ballast


@contextmanager
def filled_after(
    root: Store, disk: Path, step: int, seconds: float | None
) -> Iterator[Callable[[], int]]:
    """The disk is full from when checkpoint `step` is there: for so long, or until the end. Gives
    the newest checkpoint of the moment in which there is room again."""
    over, freed, newest = threading.Event(), threading.Event(), [0]

    def work() -> None:
        while step not in committed_steps(root.fs, root.path(CHECKPOINTS)):
            if over.wait(0.01):
                return
        ballast = fill(disk)
        over.wait(seconds)
        newest.append(committed_steps(root.fs, root.path(CHECKPOINTS))[-1])
        ballast.unlink()
        freed.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield newest.pop
    finally:
        over.set()
        thread.join()
    assert freed.is_set(), "the disk was never full"


def test_a_disk_that_stays_full(train, undisturbed, disk, capfd):
    """The run ends and says why; what was committed can be read; with room, it goes on."""
    root, after = open_store(str(disk / "run")), 3 * EVERY
    with filled_after(root, disk, after, None):
        code = train(root)
        assert code == 3
        said = "".join(capfd.readouterr())
        assert "No space left on device" in said
        steps = committed_steps(root.fs, root.path(CHECKPOINTS))
        assert after in steps and steps[-1] < STEPS
        for step in steps:
            assert load_checkpoint(root.fs, root.path(CHECKPOINTS), step) is not None
    assert train(root) == 0
    assert_same(final(root), undisturbed)


def test_a_disk_that_is_full_for_a_moment(train, undisturbed, disk):
    """At the end of a run, whose last save is tried again: its few steps are long over when there
    is room. Where they were over before the disk was full: once more."""
    for attempt in range(5):
        root = open_store(str(disk / f"run-{attempt}"))
        with filled_after(root, disk, STEPS - EVERY, 12.0) as newest:
            assert train(root) == 0
        assert_same(final(root), undisturbed)
        if newest() < STEPS:
            return
        shutil.rmtree(disk / f"run-{attempt}")
    pytest.fail("the last save never met a full disk")
