"""A writer ends (SIGKILL) right before and right after everything that others can see."""

import json
import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest

from tests.chaos.stand_in import POINTS, SAMPLES, run_in_process
from tests.chaos.whole import assert_whole, landed_table_ids, sealed_manifests, stored_ids

BEFORE, AFTER = ["a red fox", "a blue whale"], ["a red fox", "a green apple", "a flag"]


def in_process(root: Path, prompts: Path, *arguments: object) -> int | None:
    """The exit code of a process that is forked from one which has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.chaos.stand_in"])
    process = context.Process(target=run_in_process, args=(str(root), str(prompts), *arguments))
    process.start()
    process.join(120)
    code = process.exitcode
    process.kill()
    return code


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A data set with a version, whose lease a killed process has left behind."""
    folder = tmp_path_factory.mktemp("begun")
    prompts, root = folder / "prompts.txt", folder / "set"
    prompts.write_text("\n".join(BEFORE))
    assert in_process(root, prompts, False) == 0
    prompts.write_text("\n".join(AFTER))
    assert in_process(root, prompts, True, "first beat", True) == -signal.SIGKILL
    return folder


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", POINTS)
def test_a_writer_killed_at_a_named_point_is_followed_by_one_that_ends_its_work(
    begun, tmp_path, name, after
):
    shutil.copytree(begun, tmp_path / "copy")
    prompts, root = tmp_path / "copy" / "prompts.txt", tmp_path / "copy" / "set"
    assert in_process(root, prompts, True, name, after) == -signal.SIGKILL
    for manifest in sealed_manifests(root):  # what a reader sees in this very moment
        assert all((root / file["key"]).exists() for file in manifest["files"])
    assert in_process(root, prompts, True) == 0

    newest = assert_whole(root, SAMPLES * len(AFTER))
    assert stored_ids(root, newest) == landed_table_ids(root, newest["prompts_digest"])
    assert newest["excluded_files"] == [] and not any(f["excluded"] for f in newest["files"])
    log = [json.loads(path.read_text()) for path in sorted(root.glob("manifests/*.json"))]
    assert [path.stem for path in sorted(root.glob("manifests/*.json"))] == [
        f"{number:06d}" for number in range(1, len(log) + 1)
    ]
    sealed = [entry for entry in log if not entry.get("void")]
    why = [entry["reason"] for entry in log if entry.get("void")]
    assert sealed == [newest] and why.count("collected") == 1
    kept = {file["key"] for file in newest["files"]}
    assert {str(path.relative_to(root)) for path in root.glob("generations/*/data/*")} == kept
    assert len(list(root.glob("generations/*/ledger/*"))) == len(kept)
    assert [path.stem for path in root.glob("prompts/*.parquet")] == [newest["prompts_digest"]]
    assert not (root / "collecting.json").exists()
    # The lease is free again, and there is nothing more to do: no number is used up.
    assert in_process(root, prompts, True) == 0
    assert (root.parent / "set.made").read_text() == "False"
    assert len(list(root.glob("manifests/*.json"))) == len(log)
