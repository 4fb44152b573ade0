"""What goes wrong at the door: one paragraph, the right exit code, nothing half-written."""

import os
import shutil

import pytest

from jobs.cli import VERBS, main
from jobs.errors import Exit, JobError
from jobs.pairs import check_rejects
from tests.jobs.tiny_cli import run_tiny


@pytest.fixture
def dmd(tiny_teacher_dir, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {index}" for index in range(12)))

    def run(verb: str, **settings: object) -> tuple[int, str]:
        base = {
            "run.dir": tmp_path / "run",
            "teacher.path": tiny_teacher_dir,
            "pairs.prompts": prompts,
        }
        return run_tiny(verb, base, settings, capsys)

    run.folder = tmp_path
    return run


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "nonesuch"),
        (b"", "no prompts"),
        (b"\n\n  \n", "no prompts"),
        (b"fox\n\x00\x01\x02\xff\xfe", "line"),
        (b"fox\n" + b"x" * 100_000, "line 2"),
    ],
)
def test_bad_prompt_files_are_refused(dmd, content, expected):
    path = dmd.folder / "nonesuch.txt"
    if content is not None:
        path = dmd.folder / "bad.txt"
        path.write_bytes(content)
    code, message = dmd("pairs", pairs__prompts=path)
    assert code == Exit.REFUSED
    assert message.startswith("error: ") and expected in message and str(path) in message
    assert not (dmd.folder / "run" / "pairs" / "manifests").exists()


@pytest.mark.parametrize(
    "part", ["unet", "vae", "model_index.json", "text_encoder/model.safetensors"]
)
def test_a_teacher_with_a_missing_part_names_it(dmd, tiny_teacher_dir, part):
    broken = dmd.folder / "broken"
    shutil.copytree(tiny_teacher_dir, broken)
    target = broken / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    code, message = dmd("pairs", teacher__path=broken)
    assert code == Exit.REFUSED and part.split("/")[0] in message and str(broken) in message


def test_a_teacher_that_does_not_exist(dmd):
    code, message = dmd("pairs", teacher__path=dmd.folder / "nowhere")
    assert code == Exit.REFUSED and "nowhere" in message


def test_an_unwritable_output(dmd):
    (dmd.folder / "file").write_text("in the way")
    code, message = dmd("pairs", run__dir=dmd.folder / "file" / "run")
    assert code == Exit.REFUSED and "cannot write" in message


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named(dmd, monkeypatch):
    import jobs.session

    def full(fs, path, data):
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(data)

    monkeypatch.setattr(jobs.session, "write_atomic", full)
    code, message = dmd("pairs")
    assert code == Exit.REFUSED and "disk is full" in message


def test_stations_out_of_order_say_what_to_run_first(dmd):
    for verb, first in (
        ("train", "dmd pairs"),
        ("export", "dmd train"),
        ("report", "dmd evaluate"),
    ):
        code, message = dmd(verb)
        assert code == Exit.REFUSED and first in message


def test_other_settings_in_a_run_folder_with_work_are_refused(dmd):
    (dmd.folder / "run" / "checkpoints").mkdir(parents=True)
    dmd("train")  # writes config.yaml, then misses the pairs
    code, message = dmd("train", train__learning_rate=0.5)
    assert code == Exit.REFUSED and "train.learning_rate: 0.001 → 0.5" in message
    code, message = dmd("train", train__max_train_steps=50)
    assert "dmd pairs" in message  # going on for longer is allowed


def test_too_many_rejected_rows_are_exit_code_5():
    check_rejects(rows=99, rejected=1, allowed=0.01)
    with pytest.raises(JobError, match="2 of 100 rows") as caught:
        check_rejects(rows=98, rejected=2, allowed=0.01)
    assert caught.value.code == Exit.REJECTS == 5


def test_an_unknown_key_is_a_usage_error(dmd):
    code, message = dmd("pairs", pairs__step=3)
    assert code == Exit.USAGE and "did you mean pairs.steps" in message


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help_with_examples(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0 and "examples:" in capsys.readouterr().out


def test_a_dry_run_plans_and_starts_nothing(dmd, capsys, tiny_teacher_dir):
    prompts = dmd.folder / "prompts.txt"
    settings = (f"pairs.prompts={prompts}", f"teacher.path={tiny_teacher_dir}")
    arguments = ["--config", "tiny", "--set", f"run.dir={dmd.folder / 'dry'}"]
    arguments += [part for setting in settings for part in ("--set", setting)]
    assert main(["pairs", "--dry-run", *arguments]) == 0
    plan = capsys.readouterr().out
    assert "rows                     12" in plan and "estimated_seconds" in plan
    assert "network_evaluations      96" in plan  # 12 rows, 4 steps, guidance doubles
    assert not (dmd.folder / "dry" / "config.yaml").exists()
