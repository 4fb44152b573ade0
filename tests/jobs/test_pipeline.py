"""`dmd pipeline`: what is skipped, what runs and why; which folder a training has."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import pipeline_steps
from jobs.cli import main
from jobs.errors import Exit, JobError
from jobs.pipeline_steps import NAMES
from pipelines.chain import read_record, write_record
from pipelines.lease import hold_lease
from pipelines.storage import open_store
from tests.jobs.fake_pipeline import HELD_OUT

ALL = list(NAMES)
AFTER_TRAINING = ["export", "evaluate", "report"]


def test_all_steps_once_and_none_again(pipeline):
    code, _, ran = pipeline()
    assert code == Exit.OK and ran == ALL
    latest = pipeline.latest()
    assert {p.stem for p in (latest / "steps").glob("*.json")} == {"train", *AFTER_TRAINING}
    assert (pipeline.run / "steps" / "regenerate.json").exists()
    assert (pipeline.run / "latest").resolve() == latest

    before = pipeline.files()
    code, said, ran = pipeline()
    assert code == Exit.OK and ran == [] and said.count("nothing to do") == 5
    assert pipeline.files() == before


def test_grown_prompts_make_a_training_of_their_own(pipeline):
    pipeline()
    first = pipeline.latest()
    kept = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    pipeline.write_prompts(15)
    code, said, ran = pipeline()
    assert code == Exit.OK and ran == ALL
    assert "prompts" in said and "a new training: pairs version 1" in said
    assert pipeline.latest() != first and len(pipeline.trainings()) == 2
    assert {p: p.read_bytes() for p in first.rglob("*") if p.is_file()} == kept
    pins = json.loads((pipeline.latest() / "pins.json").read_text())
    assert pins["default"] == 2
    assert pipeline()[2] == []


def test_prompts_rewritten_to_the_same_rows_end_the_cascade(pipeline):
    pipeline()
    lines = pipeline.prompts.read_text()
    pipeline.prompts.write_text(f"{lines}\nprompt 0")  # a prompt that is there already
    assert pipeline()[2] == ["regenerate"]
    assert pipeline()[2] == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"evaluate__seed": 7}, ["evaluate", "report"]),
        ({"evaluate__batch_size": 4}, ["evaluate"]),  # the same metrics came out
        ({"train__learning_rate": 0.5}, ["train", *AFTER_TRAINING]),
        ({"train__max_train_steps": 8}, ["train", *AFTER_TRAINING]),
        ({"train__max_train_steps": 4}, ["train"]),  # there are more steps already
        ({"train__num_workers": 2, "train__max_failures": 9, "pairs__actors": 3}, []),
        ({"pairs__keep_versions": 9}, ["regenerate"]),
    ],
)
def test_changed_settings_run_what_follows_from_them(pipeline, change, expected):
    pipeline()
    code, _, ran = pipeline(**change)
    assert code == Exit.OK and ran == expected
    assert pipeline(**change)[2] == []


def test_changed_held_out_prompts_and_teacher(pipeline, tmp_path):
    pipeline()
    pipeline.held_out.write_text(pipeline.held_out.read_text() + "\none more")
    assert pipeline()[2] == ["evaluate"]  # the fake's metrics do not depend on them
    other = tmp_path / "other"
    shutil.copytree(str(pipeline.base["teacher.path"]), other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"beta_start": 0.001}))
    pipeline.write_prompts(13)
    code, said, ran = pipeline(teacher__path=other)
    assert code == Exit.OK and ran == ALL and "teacher" in said


def test_the_same_teacher_elsewhere_is_the_same_teacher(pipeline, tmp_path):
    pipeline()
    shutil.copytree(str(pipeline.base["teacher.path"]), tmp_path / "moved")
    code, said, ran = pipeline(teacher__path=tmp_path / "moved", storage__region="eu-west-1")
    assert code == Exit.OK and ran == [], said


def test_a_run_folder_that_was_moved_names_its_new_place(pipeline):
    settings = {"train__lambda_reg": 0}  # without pairs, for those are where they were
    pipeline(**settings)
    old = pipeline.run
    pipeline.run = old.rename(old.with_name("moved"))
    pipeline.base["run.dir"] = pipeline.run
    code, said, ran = pipeline("--json", **settings)
    found = json.loads(pipeline.out)
    assert code == Exit.OK and ran == [] and not old.exists(), said
    for name in ("training", "student", "report"):
        assert Path(found[name]).exists() and str(pipeline.run) in found[name]


def test_settings_put_back_find_the_training_that_was_done(pipeline):
    pipeline()
    first = pipeline.latest()
    pipeline(train__learning_rate=0.5)
    assert pipeline.latest() != first
    code, _, ran = pipeline()
    assert code == Exit.OK and ran == [] and pipeline.latest() == first
    assert (pipeline.run / "latest").resolve() == first


def test_longer_training_goes_on_in_its_folder(pipeline):
    pipeline()
    pipeline(train__max_train_steps=8)
    assert len(pipeline.trainings()) == 1
    steps = {path.name for path in pipeline.latest().glob("checkpoints/*")}
    assert {"checkpoint-00000006", "checkpoint-00000008"} <= steps


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ("steps/export.json", ["export"]),
        ("student/unet.safetensors", ["export"]),
        ("student", ["export"]),
        ("student.json", ["export"]),
        ("metrics.json", ["evaluate"]),
        ("evaluation/noise", ["evaluate"]),
        ("report.html", ["report"]),
        ("checkpoints", ["train"]),
    ],
)
def test_output_that_is_gone_is_made_again(pipeline, gone, expected):
    pipeline()
    path = pipeline.latest() / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, _, ran = pipeline()
    assert code == Exit.OK and ran == expected  # what comes out is the same: nothing follows
    assert pipeline()[2] == []


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "health.json", "validation/step_00000006.json", "versions.json"]
)
def test_a_run_that_went_on_under_the_same_metrics_gets_another_report(pipeline, name):
    """As where the best checkpoint of a longer training is still that of the shorter one."""
    pipeline()
    path = pipeline.latest() / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"step": 6}\n')
    code, said, ran = pipeline()
    assert code == Exit.OK and ran == ["report"] and name.split("/")[0] in said
    assert pipeline()[2] == []


@pytest.mark.parametrize(
    ("name", "other", "expected"),
    [
        ("numerics_version", lambda compute_dtype: 99, "regenerate"),
        ("PICTURES_NUMERICS", 99, "evaluate"),
    ],
)
def test_other_numerics_are_other_work(pipeline, monkeypatch, name, other, expected):
    pipeline()
    monkeypatch.setattr(pipeline_steps, name, other)
    code, said, ran = pipeline()
    assert code == Exit.OK and ran == [expected] and "numerics" in said
    assert pipeline()[2] == []


@pytest.mark.parametrize("then", [pipeline_steps.PICTURES_NUMERICS, 1, None])
def test_a_record_of_an_earlier_release_has_the_numerics_of_its_metrics(pipeline, then):
    pipeline()
    latest = pipeline.latest()
    metrics = json.loads((latest / "metrics.json").read_text())
    metrics |= {"provenance": {"inputs": {"numerics": then}}}
    (latest / "metrics.json").write_text(json.dumps(metrics))
    store = open_store(str(latest))
    record = read_record(store, "evaluate")
    inputs = {name: value for name, value in record.inputs.items() if name != "numerics"}
    output = {"metrics": pipeline_steps._digest(metrics)}
    write_record(store, replace(record, inputs=inputs, output=output))
    _, _, ran = pipeline()
    assert ("evaluate" in ran) == (then != pipeline_steps.PICTURES_NUMERICS)


def test_output_that_somebody_changed_is_made_again(pipeline):
    pipeline()
    report, metrics = (pipeline.latest() / name for name in ("report.html", "metrics.json"))
    whole = report.read_bytes()
    report.write_bytes(b"something else")
    _, said, ran = pipeline()
    assert ran == ["report"] and "not what it left" in said and report.read_bytes() == whole
    metrics.write_text(metrics.read_text().replace("1000", "1001"))
    assert pipeline()[2] == ["evaluate"]


@pytest.mark.parametrize(
    ("step", "damage"),
    [
        ("regenerate", "torn"),
        ("train", "tampered"),
        ("export", "foreign"),
        ("evaluate", "another step's"),
    ],
)
def test_an_unreadable_record_is_an_error_that_names_it(pipeline, step, damage):
    pipeline()
    folder = pipeline.run if step == "regenerate" else pipeline.latest()
    path = folder / "steps" / f"{step}.json"
    content = json.loads(path.read_text())
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:40])
    elif damage == "tampered":
        path.write_text(json.dumps(content | {"output": {"step": 7}}))
    elif damage == "foreign":
        path.write_text("[1, 2]")
    else:
        path.write_text(json.dumps(content | {"step": "report"}))
    code, said, ran = pipeline()
    assert code == Exit.REFUSED and str(path) in said and ran == []
    path.unlink()  # the way on that the message names
    code, _, ran = pipeline()
    assert code == Exit.OK and ran == [step]


@pytest.mark.parametrize("step", ALL)
def test_a_chain_that_stopped_goes_on_where_it_was(pipeline, step):
    pipeline.verbs.fail[step] = JobError("stopped", Exit.TRANSIENT)
    code, said, ran = pipeline()
    assert code == Exit.TRANSIENT and "stopped" in said and ran == ALL[: ALL.index(step) + 1]
    code, _, ran = pipeline()
    assert code == Exit.OK and ran == ALL[ALL.index(step) :]
    assert len(pipeline.trainings()) == 1


def test_too_many_rejects_stop_the_chain_with_their_code(pipeline):
    result = {"rejected": 3}
    pipeline.verbs.fail["regenerate"] = JobError("3 rejected", Exit.REJECTS, result=result)
    code, said, ran = pipeline("--json")
    assert code == Exit.REJECTS and ran == ["regenerate"] and "3 rejected" in said
    assert json.loads(pipeline.out) == result


def test_from_does_again_what_has_not_changed(pipeline):
    pipeline()
    first = pipeline.latest()
    code, said, ran = pipeline("--from", "evaluate")
    assert code == Exit.OK and ran == ["evaluate", "report"]
    assert "report: asked for with --from evaluate" in said
    code, _, ran = pipeline("--from", "train")
    assert code == Exit.OK and ran == ["train", *AFTER_TRAINING]
    assert pipeline.trainings() == [first.name, f"{first.name}-2"]
    assert pipeline.latest().name == f"{first.name}-2"
    assert (first / "checkpoints" / "checkpoint-00000006" / "MANIFEST.json").exists()
    assert pipeline()[2] == []
    assert pipeline("--from", "train")[0] == Exit.OK
    assert pipeline.latest().name == f"{first.name}-3"


@pytest.mark.parametrize("step", ["train", "export", "evaluate"])
def test_a_redo_that_was_killed_goes_on_with_the_same_command(pipeline, step):
    pipeline()
    name = pipeline.latest().name
    pipeline.verbs.fail[step] = JobError("stopped", Exit.TRANSIENT)
    assert pipeline("--from", "train")[0] == Exit.TRANSIENT
    code, said, ran = pipeline("--from", "train")
    assert code == Exit.OK and ran == ALL[ALL.index(step) :] and "going on" in said
    assert pipeline.trainings() == [name, f"{name}-2"]


def test_a_redo_that_single_steps_have_finished_is_over(pipeline):
    pipeline()
    pipeline.verbs.fail["evaluate"] = JobError("stopped", Exit.TRANSIENT)
    assert pipeline("--from", "evaluate")[0] == Exit.TRANSIENT
    for step in ("evaluate", "report"):
        assert pipeline("--only", step)[2] == [step]
    assert pipeline("--from", "evaluate")[2] == ["evaluate", "report"]


def test_only_one_step(pipeline):
    code, said, ran = pipeline("--only", "evaluate")
    assert code == Exit.REFUSED and "--only regenerate" in said and ran == []
    assert pipeline("--only", "regenerate")[2] == ["regenerate"]
    code, said, ran = pipeline("--only", "evaluate")
    assert code == Exit.REFUSED and "--only train" in said and ran == []
    pipeline()
    pipeline.write_prompts(20)  # the pairs are as they are
    code, _, ran = pipeline("--only", "evaluate", evaluate__seed=5)
    assert code == Exit.OK and ran == ["evaluate"]
    assert pipeline("--only", "evaluate", evaluate__seed=5)[2] == []


def test_an_unfinished_training_is_no_input(pipeline):
    pipeline.verbs.fail["train"] = JobError("stopped", Exit.TRANSIENT)
    pipeline()
    code, said, ran = pipeline("--only", "export")
    assert code == Exit.REFUSED and "--only train" in said and ran == []


def test_dry_run_says_what_and_why_and_writes_nothing(pipeline):
    pipeline()
    before = pipeline.files()
    assert pipeline("--dry-run", "--json")[0] == Exit.OK
    assert {said.partition(":")[0] for said in json.loads(pipeline.out).values()} == {"skip"}
    pipeline("--dry-run", "--json", evaluate__seed=7)
    found = json.loads(pipeline.out)
    assert found["evaluate"] == "run: evaluate.seed default → 7"
    assert found["train"].startswith("skip") and found["report"].startswith("run: if evaluate")
    assert found["evaluate.prompts"] == HELD_OUT
    assert found["evaluate.writes_to"].endswith("metrics.json")
    assert found["estimated_seconds"] == found["evaluate.estimated_seconds"]
    pipeline("--dry-run", "--json", "--from", "export")
    found = json.loads(pipeline.out)
    assert found["export"].startswith("run: asked") and found["train"].startswith("skip")
    pipeline("--dry-run", "--json", "--only", "report")
    assert json.loads(pipeline.out)["train"] == "left out: --only"
    pipeline.write_prompts(20)
    _, _, ran = pipeline("--dry-run", "--json")
    found = json.loads(pipeline.out)
    assert found["train"].startswith("run: if regenerate") and ran == []
    assert found["regenerate.rows_to_make"] == 20 and found["train.steps_to_do"] == 6
    assert found["train.writes_to"] == f"a new folder in {pipeline.run}/trainings"
    assert "estimated_seconds" not in found  # nobody knows how long the training takes
    assert pipeline.files() == before


def test_a_first_dry_run_plans_every_step(pipeline):
    assert pipeline("--dry-run", "--json")[0] == Exit.OK
    found = json.loads(pipeline.out)
    assert found["regenerate"] == "run: not done yet" and found["train.steps_to_do"] == 6
    assert found["regenerate.rows_to_make"] == 12 and found["evaluate.prompts"] == HELD_OUT
    assert not pipeline.run.exists()


def test_results_as_json(pipeline):
    pipeline("--json")
    found = json.loads(pipeline.out)
    assert [step["ran"] for step in found["steps"].values()] == [True] * 5
    assert Path(found["report"]).is_file() and Path(found["student"]).is_dir()
    assert found["training"] == str(pipeline.latest())


def test_without_pairs_there_is_nothing_to_regenerate(pipeline):
    settings = {"train__lambda_reg": 0}
    code, said, ran = pipeline(**settings)
    assert code == Exit.OK and ran == ["train", *AFTER_TRAINING], said
    assert pipeline(**settings)[2] == []
    pipeline.write_prompts(13)  # what the training reads in place of pairs
    assert pipeline(**settings)[2] == ["train", *AFTER_TRAINING]


def test_a_training_that_follows_takes_grown_pairs_up_itself(pipeline):
    follow = {"train__follow_pairs": "epoch"}
    pipeline.verbs.fail["train"] = JobError("stopped", Exit.TRANSIENT)
    assert pipeline(**follow)[0] == Exit.TRANSIENT
    pipeline.write_prompts(15)
    code, _, ran = pipeline(**follow)
    assert code == Exit.OK and ran == ALL and len(pipeline.trainings()) == 1
    assert pipeline(**follow)[2] == []  # it read the newest version at its end
    pipeline.write_prompts(18)
    code, _, ran = pipeline(**follow)
    assert code == Exit.OK and ran == ALL and len(pipeline.trainings()) == 2


def test_an_unfinished_training_on_older_pairs_is_left(pipeline):
    pipeline.verbs.fail["train"] = JobError("stopped", Exit.TRANSIENT)
    pipeline()
    pipeline.write_prompts(15)
    code, said, ran = pipeline()
    assert code == Exit.OK and ran == ALL and len(pipeline.trainings()) == 2
    assert "the one before stays in trainings/" in said


def test_a_version_sealed_between_choice_and_training(pipeline, monkeypatch):
    """The real `dmd train` begins with the versions that its folder is named for, or not at all."""
    from jobs import train
    from jobs.pipeline_trainings import Training, TrainingSession
    from jobs.session import open_session
    from pipelines.pins import Pins

    words = [f"{key}={value}" for key, value in pipeline.base.items()]
    with open_session("tiny", words, quiet=True) as chain:
        run = TrainingSession(chain, Training("x", {"pairs": "version 3 abc"}))
        with pytest.raises(JobError, match="sealed just now") as raised:
            train._check_begins_from(run, Pins(4, {4: "def"}))
        assert raised.value.code == Exit.TRANSIENT
        train._check_begins_from(run, Pins(3, {3: "abc"}))


def test_one_chain_at_a_time(pipeline):
    with hold_lease(open_store(str(pipeline.run)).at("steps"), period_s=2, purpose="another"):
        code, said, ran = pipeline()
    assert code == Exit.TRANSIENT and "another" in said and ran == []
    assert pipeline()[0] == Exit.OK


def test_the_same_on_s3(pipeline, s3_store, s3_options):
    pipeline.base["run.dir"] = s3_store.url
    pipeline.base["storage.endpoint_url"] = s3_options.endpoint_url
    code, said, ran = pipeline()
    assert code == Exit.OK and ran == ALL, said
    assert pipeline()[2] == []
    training = json.loads(s3_store.fs.cat_file(s3_store.path("latest.json")))["training"]
    s3_store.fs.rm(f"{training}/student/unet.safetensors")
    assert pipeline()[2] == ["export"]
    s3_store.fs.pipe_file(f"{training}/steps/train.json", b"{")
    code, said, ran = pipeline()
    assert code == Exit.REFUSED and "steps/train.json" in said and ran == []


def test_what_single_verbs_did_is_taken_as_it_is(pipeline):
    def verb(name: str) -> None:
        words = [part for k, v in pipeline.base.items() for part in ("--set", f"{k}={v}")]
        assert main([name, "--config", "tiny", *words]) == Exit.OK

    for name in ALL:
        verb(name)
    assert pipeline.verbs.take() == ALL
    path = pipeline.run / "student.json"
    exported = json.loads(path.read_text())
    del exported["student_revision"]  # as an earlier release left it
    path.write_text(json.dumps(exported))
    code, said, ran = pipeline()
    assert code == Exit.OK and ran == ALL, said  # each verb says itself that it has nothing to do
    assert pipeline.latest() == pipeline.run and not (pipeline.run / "trainings").exists()
    assert pipeline()[2] == []

    pipeline.write_prompts(15)
    code, _, ran = pipeline()
    assert code == Exit.OK and ran == ALL and len(pipeline.trainings()) == 1
    assert pipeline.latest() == (pipeline.run / "latest").resolve() != pipeline.run


@pytest.mark.parametrize("gone", ["pins.json", "checkpoints", "config.yaml"])
def test_half_a_training_of_single_verbs_is_not_taken(pipeline, gone):
    pipeline()
    training = pipeline.latest()
    for path in training.iterdir():
        if path.name != "steps":
            shutil.move(path, pipeline.run / path.name)
    shutil.rmtree(pipeline.run / "trainings")
    path = pipeline.run / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert pipeline()[2] == ["train", *AFTER_TRAINING] and len(pipeline.trainings()) == 1
