"""Rows that cannot be made, from the command line through Ray to what is sealed and shown."""

import json

import pytest

from jobs.cli import main
from jobs.errors import Exit
from pipelines.manifest import latest_manifest, list_versions
from pipelines.rejects import read_rejects
from pipelines.storage import Store, open_store

NO_CLASS = "a red fox"


@pytest.fixture
def dmd(ray_cluster, families, tmp_path, capsys):
    """`dmd <verb> --json` with a teacher of cat, dog and ship: (code, result, stderr)."""

    def run(verb: str, root: Store, prompts: list[str], **settings: object):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        merged = {
            "run.dir": tmp_path / "run", "teacher.path": families.folder("ddpm"),
            "pairs.root": root.url, "pairs.prompts": tmp_path / "prompts.txt",
            "pairs.guidance_scale": 1.0, "pairs.solver": "ddim", "pairs.steps": 2,
            "pairs.attempts": 1,
        } | {f"pairs.{key}": value for key, value in settings.items()}  # fmt: skip
        if root.url.startswith("s3://"):
            merged["storage.endpoint_url"] = root.fs.endpoint_url
        options = [part for pair in merged.items() for part in ("--set", "{}={}".format(*pair))]
        code = main([verb, "--config", "tiny", "--json", *options])
        out, err = capsys.readouterr()
        # Before it stands what Ray has to say of a busy machine.
        return code, json.loads(out[out.index("{\n") :]), err.splitlines()[-1:]

    return run


def reasons(root: Store, fence: int) -> list[str]:
    """Of the run with that fence."""
    (folder,) = root.fs.ls(root.path("generations"), detail=False)
    found = read_rejects(root, folder.removeprefix(root.root + "/"), fence=fence)
    return list(found.values())


def test_rejected_rows_are_left_out_shown_and_tried_again(dmd, tmp_path):
    root, prompts = open_store(str(tmp_path / "set")), ["cat", NO_CLASS, "dog"]
    code, result, err = dmd("pairs", root, prompts)
    assert code == Exit.REJECTS and "1 of 3 rows were rejected (33.3%" in err[0]
    assert (result["version"], result["rows"], result["rejected"]) == (1, 2, 1)
    (reason,) = reasons(root, fence=1)
    assert NO_CLASS in reason and "cat, dog, ship" in reason

    _, shown, _ = dmd("inspect", root, prompts)
    assert shown["versions"][0]["reasons"] == {reason: 1}

    code, result, _ = dmd("pairs", root, prompts, max_rejected_share=0.5)
    assert code == Exit.OK and (result["rows"], result["rejected"]) == (2, 1)
    assert result["cost"]["rows"] == 1 and reasons(root, fence=2) == [reason]
    assert list_versions(root) == [1]  # it would say the same again


def test_on_s3_a_run_without_a_usable_row_ends_in_words_and_the_next_one_goes_on(dmd, s3_store):
    code, result, err = dmd("pairs", s3_store, [NO_CLASS])
    assert code == Exit.REJECTS
    assert "no usable pair, most often because of IndexError: prompt 'a red fox'" in err[0]
    assert result == {"root": s3_store.url, "rows": 0, "rejected": 1}
    assert list_versions(s3_store) == []

    code, result, _ = dmd("pairs", s3_store, ["cat", NO_CLASS], max_rejected_share=0.5)
    assert code == Exit.OK and (result["rows"], result["rejected"]) == (1, 1)
    manifest = latest_manifest(s3_store)
    assert manifest is not None and manifest.rows == 1
    assert len(reasons(s3_store, fence=1)) == len(reasons(s3_store, fence=2)) == 1
