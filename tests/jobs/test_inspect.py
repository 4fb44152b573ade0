"""`dmd inspect` from the command line: what it prints, what it writes, and its exit codes."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

import pipelines.stored_rows
from jobs.cli import main
from jobs.errors import Exit
from pipelines.dataset_pins import pin_versions, read_pins
from pipelines.inspection import _Listings
from pipelines.manifest import manifest_path, void_next_number
from pipelines.storage import open_store
from tests.pipelines.made_pairs import FINGERPRINT, write_file
from tests.pipelines.sealed_sets import commit_files, land, tamper, teacher_set


@pytest.fixture
def root(tmp_path):
    return open_store(str(tmp_path / "foxes"))


@pytest.fixture
def inspect(root, tiny_teacher_dir, capfd):
    def run(*arguments: str, dataset: str = root.root) -> tuple[int, str, str]:
        settings = ["--config", "tiny", "--set", f"teacher.path={tiny_teacher_dir}"]
        code = main(["inspect", dataset, *arguments, *settings])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_a_data_set_that_is_not_there_says_what_to_do(inspect, root, tmp_path):
    code, _, err = inspect(dataset=str(tmp_path / "nowhere"))
    assert code == Exit.REFUSED and "nowhere does not exist" in err and "dmd pairs" in err
    (tmp_path / "foxes").mkdir()
    for arguments in ([], ["--verify"], ["--checksums"]):
        code, _, err = inspect(*arguments)
        assert code == Exit.REFUSED and "no sealed version" in err and "dmd pairs" in err
    write_file(root, "a-0.parquet", range(4))
    code, _, err = inspect()  # nothing sealed, and something to show
    assert code == Exit.OK and FINGERPRINT.digest[:16] in err and "no sealed version" in err


def test_the_recipe_says_where_the_pairs_are(root, capfd):
    write_file(root, "a-0.parquet", range(4))
    commit_files(root, ["a-0.parquet"])
    arguments = ["--config", "tiny", "--set", f"pairs.root={root.root}"]
    assert main(["inspect", "--json", *arguments]) == Exit.OK
    found = json.loads(capfd.readouterr().out)
    assert found["url"] == root.url and found["versions"][0]["rows"] == 4


def test_a_pin_can_be_given_up_by_its_name(inspect, root):
    write_file(root, "a-0.parquet", range(4))
    commit_files(root, ["a-0.parquet"])
    pin_versions(root, "a-run", [1], holder="dmd train of a run", created="now")
    assert "pinned: version 1 by dmd train of a run, since now (a-run)" in inspect()[2]
    code, _, err = inspect("--unpin", "another")
    assert code == Exit.USAGE and "no pin 'another'; pins: a-run" in err
    code, _, err = inspect("--unpin", "a-run", "--dry-run")
    assert code == Exit.OK and list(read_pins(root)) == ["a-run"]
    code, _, err = inspect("--unpin", "a-run")
    assert code == Exit.OK and "unpinned version 1" in err and read_pins(root) == {}


def test_versions_are_shown_and_given_as_json(inspect, root):
    write_file(root, "a-0.parquet", range(1234))
    write_file(root, "b-0.parquet", range(1234, 1300))
    land(root, range(1301), "2" * 64)
    commit_files(root, ["a-0.parquet"])
    void_next_number(root, 3, "lease [2] was taken over")
    commit_files(root, ["a-0.parquet", "b-0.parquet"], rejected=[1300], prompts_digest="2" * 64)
    code, out, err = inspect()
    assert code == Exit.OK and out == ""
    (line,) = (line for line in err.splitlines() if line.startswith("│ 3 "))
    cells = [cell.strip() for cell in line.split("│")[1:-1]]
    assert cells[:6] == ["3", "1,300", "1", "0", "1", "2"]
    for expected in (
        "1,234",
        "ddim, 5 steps, guidance 7.5, teacher aaaaaaaaaaaaaaaa",
        "version 2: void, nobody has this number: lease [2] was taken over",
        FINGERPRINT.digest[:16],
        "1,300 of 1,301 rows",
        "1 rejected: no reason is kept",
        "nobody is writing",
        "latent std 1",
    ):
        assert expected in err, expected
    code, out, err = inspect("--json")
    found = json.loads(out)
    assert code == Exit.OK and err == ""
    assert [v["rows"] for v in found["versions"]] == [1234, 1300]
    assert found["versions"][1]["missing"] == 1 and found["void"] == {
        "2": "lease [2] was taken over"
    }
    assert [
        v["version"] for v in json.loads(inspect("--json", "--version", "1")[1])["versions"]
    ] == [1]
    code, _, err = inspect("--version", "2")
    assert code == Exit.REFUSED and "000002.json" in err


def test_a_missing_file_ends_the_look_with_its_name(inspect, root):
    path = write_file(root, "a-0.parquet", range(4))
    write_file(root, "b-0.parquet", range(4, 8))
    commit_files(root, ["a-0.parquet", "b-0.parquet"])
    assert inspect("--checksums")[0] == Exit.OK
    Path(path).unlink()
    for arguments in ([], ["--checksums"]):
        code, _, err = inspect(*arguments)
        assert code == Exit.REFUSED and f"{path}: missing" in err
    code, out, err = inspect("--json")
    found = json.loads(out)  # what is damaged, and beside it what is not
    assert code == Exit.REFUSED and found["versions"][0]["rows"] == 8
    assert f"{path}: missing" in found["problems"][0]
    code, out, err = inspect("--checksums", "--json")
    found = json.loads(out)
    assert code == Exit.REFUSED and found["version"] == 1 and found["checksums"]["problems"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], Exit.OK), (["--version", "1"], Exit.REFUSED),
     (["--checksums", "--version", "1"], Exit.REFUSED)],
)  # fmt: skip
def test_a_version_that_is_collected_meanwhile_is_not_damage(
    inspect, root, monkeypatch, arguments, expected
):
    path = write_file(root, "a-0.parquet", range(4))
    write_file(root, "b-0.parquet", range(4, 8))
    commit_files(root, ["a-0.parquet"])
    commit_files(root, ["b-0.parquet"])

    def collected_before(then):
        def look(*args):
            Path(manifest_path(root, 1)).unlink(missing_ok=True)
            Path(path).unlink(missing_ok=True)
            return then(*args)

        return look

    check_files = pipelines.stored_rows.check_files
    monkeypatch.setattr(_Listings, "sizes", collected_before(_Listings.sizes))
    monkeypatch.setattr(pipelines.stored_rows, "check_files", collected_before(check_files))
    code, out, err = inspect("--json", *arguments)
    assert code == expected and "missing," not in err
    if code == Exit.OK:
        assert [v["version"] for v in json.loads(out)["versions"]] == [2]
    else:
        assert "no such version; sealed versions: 2" in err


def test_two_versions_are_compared(inspect, root):
    write_file(root, "a-0.parquet", range(8))
    write_file(root, "b-0.parquet", range(8, 10))
    commit_files(root, ["a-0.parquet"])
    commit_files(root, ["a-0.parquet", "b-0.parquet"], excluded={"a-0.parquet": [3]})
    code, _, err = inspect("--diff", "1", "2")
    assert code == Exit.OK
    for expected in (
        "2 added, 1 removed, 7 kept",
        "same files: 7",
        "fingerprint: the same",
        "prompts added: 2",
        "prompt 8",
        "prompts removed: 1",
        "prompt 3",
    ):
        assert expected in err
    found = json.loads(inspect("--diff", "2", "1", "--json")[1])["diff"]
    assert (found["added"], found["removed"], found["kept"]) == (1, 2, 7)


def test_the_teacher_confirms_its_rows_or_names_those_that_differ(inspect, root, tiny_teacher_dir):
    manifest = teacher_set(root, tiny_teacher_dir, 10)
    code, _, err = inspect("--verify")
    assert code == Exit.OK and "10 rows of version 1 (drawn with seed 0)" in err
    assert json.loads(inspect("--verify", "3", "--seed", "5", "--json")[1])["verify"]["rows"] == 3
    tamper(root, manifest, "latent", 7, 0.25)
    code, _, err = inspect("--verify")
    assert code == Exit.REFUSED and "1 ids whose latents differ: 7" in err
    code, out, _ = inspect("--verify", "--json")
    assert code == Exit.REFUSED and json.loads(out)["verify"]["latents_differ"] == [7]
    assert inspect("--verify", "--tolerance", "0.5")[0] == Exit.OK
    code, _, err = inspect("--checksums")
    assert code == Exit.OK  # file and manifest agree: only the teacher can tell


def test_pictures_of_random_rows_are_written(
    inspect, root, tiny_teacher_dir, monkeypatch, tmp_path
):
    teacher_set(root, tiny_teacher_dir, 10)
    monkeypatch.chdir(tmp_path)
    code, _, err = inspect("--sample", "4", "--dry-run")
    assert code == Exit.OK and not list(tmp_path.glob("*.png"))
    code, _, err = inspect("--sample", "4")
    assert code == Exit.OK and "foxes-v1.png" in err and "4 of 10 pairs, drawn with seed 0" in err
    picture = Image.open(io.BytesIO((tmp_path / "foxes-v1.png").read_bytes()))
    assert picture.format == "PNG" and min(picture.size) > 320
    assert inspect("--sample", "--out", str(tmp_path / "new" / "x.png"))[0] == Exit.OK
    assert (tmp_path / "new" / "x.png").exists()


@pytest.mark.parametrize("arguments", [["--sample"], ["--verify"]])
def test_another_teacher_is_named(inspect, root, arguments):
    write_file(root, "a-0.parquet", range(4))
    commit_files(root, ["a-0.parquet"])
    code, _, err = inspect(*arguments)
    assert code == Exit.REFUSED and "a" * 64 in err and "teacher.path" in err


@pytest.mark.parametrize(
    "arguments",
    [["--sample", "0"], ["--version", "x"], ["--diff", "1"], ["--sample", "--seed", "-1"]],
)
def test_nonsense_on_the_command_line_is_a_usage_error(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "set", *arguments])
    assert stopped.value.code == Exit.USAGE
