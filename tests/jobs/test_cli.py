"""What goes wrong at the door: one paragraph, the right exit code, nothing half-written."""

import errno
import json
import os
import shutil
from pathlib import Path

import aiohttp
import pytest
import s3fs
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from fsspec.exceptions import FSTimeoutError

import jobs.inspect
import jobs.pairs
from jobs.cli import VERBS, main
from jobs.errors import Exit, JobError
from jobs.pairs import check_rejects
from jobs.session import open_session
from pipelines.commits import StoreError
from pipelines.storage import no_answer
from tests.jobs.tiny_cli import run_tiny
from tests.jobs.worker_errors import caused, reply

DEAD = "http://127.0.0.1:1"


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


def test_a_list_that_grows_does_not_lock_its_training_out_and_another_sampler_does(dmd):
    (dmd.folder / "run" / "checkpoints").mkdir(parents=True)
    dmd("train")
    longer = dmd.folder / "longer.csv"
    longer.write_text("text\n" + "\n".join(f"prompt {index}" for index in range(50)))
    grown = {
        "pairs__prompts": longer,
        "pairs__prompt_column": "text",
        "pairs__samples_per_prompt": 3,
        "pairs__batch_size": 2,
        "pairs__rows_per_block": 24,
        "pairs__row_group_rows": 6,
    }
    for key, value in grown.items():
        code, message = dmd("train", **{key: value})
        assert "other settings" not in message and "dmd pairs" in message, key
    sampler = {"solver": "ddim", "steps": 9, "guidance_scale": 3.0, "negative_prompt": "x",
               "height": 32, "dtype": "float32", "compute_dtype": "bfloat16"}  # fmt: skip
    for key, value in sampler.items():
        code, message = dmd("train", **{f"pairs__{key}": value})
        assert code == Exit.REFUSED and f"pairs.{key}: " in message, key
    assert "run.seed: 0 → 1" in dmd("train", run__seed=1)[1]


def test_too_many_rejected_rows_are_exit_code_5():
    check_rejects(rows=99, rejected=1, allowed=0.01)
    with pytest.raises(JobError, match="2 of 100 rows") as caught:
        check_rejects(rows=98, rejected=2, allowed=0.01)
    assert caught.value.code == Exit.REJECTS == 5


def test_a_result_is_printed_also_when_it_is_an_error(dmd, monkeypatch, capsys):
    def run(session):
        raise JobError("too many", Exit.REJECTS, result={"rows": 98})

    monkeypatch.setattr(jobs.pairs, "run", run)
    assert main(["pairs", "--config", "tiny", "--json"]) == Exit.REJECTS
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"rows": 98} and printed.err == "error: too many\n"
    assert main(["pairs", "--config", "tiny"]) == Exit.REJECTS
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- stores

LATER = [
    reply(500, "InternalError"),
    reply(502),
    reply(503, "SlowDown"),
    reply(429),
    reply(400, "RequestTimeout"),
    EndpointConnectionError(endpoint_url=DEAD),
    aiohttp.ServerDisconnectedError(),
    FSTimeoutError(),
    caused(StoreError("cannot be read"), reply(503)),
]
NEVER = [
    reply(403, "AccessDenied"),
    reply(404, "NoSuchKey"),
    reply(412, "PreconditionFailed"),
    reply(501, "NotImplemented"),
    NoCredentialsError(),
    OSError(errno.EIO, "the disk is broken"),
    PermissionError("not yours"),
    caused(StoreError("cannot create"), reply(403)),
]


@pytest.mark.parametrize(
    ("error", "code"),
    [(error, Exit.TRANSIENT) for error in LATER] + [(error, Exit.REFUSED) for error in NEVER],
    ids=repr,
)
def test_what_a_store_answers_says_whether_to_try_again(error, code, monkeypatch, capfd):
    def run(session):
        raise error

    monkeypatch.setattr(jobs.inspect, "run", run)
    assert no_answer(error) is (code == Exit.TRANSIENT)
    assert main(["inspect", "x", "--set", f"storage.endpoint_url={DEAD}"]) == code
    said = capfd.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    if code == Exit.TRANSIENT and not isinstance(error, StoreError):
        assert f"the store at {DEAD} did not answer: " in said and "try again" in said


@pytest.mark.parametrize("arguments", [["inspect", "s3://b/x"], ["pairs"]])
def test_a_store_that_is_not_there_is_one_line(arguments, monkeypatch, capfd):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    settings = [f"storage.endpoint_url={DEAD}", "run.dir=s3://b/run"]
    options = [part for setting in settings for part in ("--set", setting)]
    assert main([*arguments, "--config", "tiny", *options]) == Exit.TRANSIENT
    said = capfd.readouterr().err
    assert said.startswith(f"error: the store at {DEAD} did not answer: ")
    assert said.endswith("; try again\n") and said.count("\n") == 1
    assert "cannot write" not in said  # nobody refused


def test_a_store_without_credentials_or_bucket_is_refused_at_the_door(
    s3_endpoint, monkeypatch, capfd
):
    def door(region: str) -> tuple[int, str]:  # a client of its own for each region
        settings = (f"storage.endpoint_url={s3_endpoint}", "run.dir=s3://X_/run")
        options = [f"--set={setting}" for setting in (*settings, f"storage.region={region}")]
        code = main(["pairs", "--config", "tiny", *options])
        return code, capfd.readouterr().err

    code, said = door("us-west-1")
    assert code == Exit.REFUSED and "cannot write to s3://X_/run" in said
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    code, said = door("us-west-2")
    assert code == Exit.REFUSED and "cannot write" in said and "credentials" in said


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3://key:secret@bucket/x"])
def test_a_store_url_that_cannot_be_used_is_one_line(url, capfd):
    assert main(["inspect", url]) == Exit.REFUSED
    said = capfd.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "secret" not in said.split()


def test_a_remote_teacher_is_copied_once_and_a_local_one_is_used_where_it_lies(
    tiny_teacher_dir, s3_store, s3_endpoint
):
    s3_store.fs.put(tiny_teacher_dir, s3_store.path("teacher"), recursive=True)
    settings = [f"teacher.path={s3_store.url}/teacher", f"storage.endpoint_url={s3_endpoint}"]
    folders = []
    for _ in range(2):
        with open_session("tiny", settings, quiet=True) as session:
            folders.append(Path(session.teacher_dir))
    assert folders[0] == folders[1] and (folders[0] / "unet").is_dir()
    with open_session("tiny", [f"teacher.path={tiny_teacher_dir}"], quiet=True) as session:
        assert session.teacher_dir == tiny_teacher_dir


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
