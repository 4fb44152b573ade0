"""`dmd evaluate` does what is due, and refuses at once what cannot be measured."""

import hashlib
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from dmd_core import inception
from jobs import evaluate
from jobs.errors import Exit
from jobs.evaluate_checks import check_beside, check_measurable, held_out_prompts
from jobs.session import Session, open_session
from pipelines import evaluation
from pipelines.cifar10 import CLASSES, Cifar10Error
from pipelines.evaluation import METRICS, timing_inputs
from tests.jobs.tiny_cli import run_tiny


@pytest.fixture
def dmd(tiny_teacher_dir, tmp_path, capfd, monkeypatch):
    """`dmd evaluate` without networks and Ray: (what was measured, "all" or "timing"; what was
    said)."""
    folder, done = tmp_path / "run", []
    folder.mkdir()
    exported = {"step": 2, "teacher_revision": "t", "student_revision": "s"}
    (folder / "student.json").write_text(json.dumps(exported))

    def measure_all(section, pairs, *, run, networks, provenance, **rest):
        done.append("all")
        metrics = {"provenance": provenance, "timing": timing(section, None, networks, ())}
        run.fs.pipe_file(run.path(METRICS), json.dumps(metrics).encode())

    def timing(section, plan, networks, chosen):
        return {"run": len(done), "inputs": timing_inputs(section, networks.threads)}

    def timing_alone(*given):
        done.append("timing")
        return timing(*given)

    board = SimpleNamespace(set=None)
    for target, name, fake in (
        (evaluate, "evaluate", measure_all),
        (evaluation, "_timing", timing_alone),
        (evaluate, "check_student", lambda session, exported: "student"),
        (evaluate, "check_teacher_revision", lambda *given: None),
        (evaluate, "check_room", lambda *given, **more: None),
        (evaluate, "_mean_latents", lambda session: None),
        (Session, "start_ray", lambda session: None),
        (Session, "watch", lambda *given: nullcontext(board)),
    ):
        monkeypatch.setattr(target, name, fake)

    def run(**changes: object) -> tuple[list[str], str]:
        base = {"run.dir": folder, "teacher.path": tiny_teacher_dir}
        code, said = run_tiny("evaluate", base, changes, capfd)
        assert code == Exit.OK, said
        found, done[:] = list(done), []
        return found, said

    run.metrics = folder / METRICS
    return run


@pytest.mark.parametrize(
    "change",
    [
        {"evaluate__gpus_per_actor": 1},
        {"evaluate__cpus_per_actor": 2},
        {"pairs__threads_per_actor": 2},
        {"evaluate__placement": "{accelerator_type: H100}"},
    ],
)
def test_on_other_resources_the_timing_alone_is_measured_again(dmd, change):
    assert dmd()[0] == ["all"]
    assert dmd()[0] == []
    before = json.loads(dmd.metrics.read_text())
    found, said = dmd(**change)
    assert found == ["timing"] and "only the timing is due" in said
    after = json.loads(dmd.metrics.read_text())
    assert after["timing"] != before["timing"]
    assert after | {"timing": None} == before | {"timing": None}
    assert dmd(**change)[0] == [] and "nothing to do" in dmd(**change)[1]
    assert dmd()[0] == ["timing"]


def test_what_changes_no_timing_and_what_changes_all(dmd):
    assert dmd()[0] == ["all"]
    assert dmd(evaluate__actors=3)[0] == []
    assert dmd(evaluate__seed=7, evaluate__gpus_per_actor=1)[0] == ["all"]
    metrics = json.loads(dmd.metrics.read_text())
    del metrics["timing"]["inputs"]  # as an earlier release left it
    dmd.metrics.write_text(json.dumps(metrics))
    assert dmd(evaluate__seed=7, evaluate__gpus_per_actor=1)[0] == ["timing"]


@pytest.fixture
def session(tiny_teacher_dir, tmp_path, monkeypatch):
    """Of a recipe with Inception and two real pictures of each class; nothing reads them."""
    weights, data = tmp_path / "weights.pt", tmp_path / "data"
    weights.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(inception, "_SHA256", digest)
    (data / "train").mkdir(parents=True)
    (data / "train" / "a.parquet").write_bytes(b"x")
    entry = {"bytes": 1, "per_class": [2] * 10, "records_sha256": ""}
    (data / "dataset.json").write_text(json.dumps({"files": {"train/a.parquet": entry}}))
    prompts = tmp_path / "prompts.txt"

    def make(lines: list[str], **changes: object) -> Session:
        prompts.write_text("\n".join(lines))
        settings = {
            "run.dir": tmp_path / "run", "teacher.path": tiny_teacher_dir,
            "evaluate.prompts": prompts, "evaluate.features": "inception",
            "evaluate.inception": weights, "evaluate.real": data, "train.evaluation.steps": 2,
        }  # fmt: skip
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        return open_session("tiny", [f"{key}={value}" for key, value in settings.items()])

    return make


@pytest.mark.parametrize(
    "check", [check_beside, lambda session: check_measurable(session, held_out_prompts(session))]
)
@pytest.mark.parametrize(
    ("lines", "changes", "expected"),
    [
        ([f"prompt {row}" for row in range(10)], {}, "'prompt 0' is no class"),
        (CLASSES, {"evaluate__samples_per_prompt": 3}, "3 real pictures of 'airplane', .* has 2"),
        ([*CLASSES, "3"], {"evaluate__samples_per_prompt": 2}, "4 real pictures of 'cat'"),
    ],
)
def test_real_pictures_that_are_not_there(session, check, lines, changes, expected):
    with pytest.raises(Cifar10Error, match=expected):
        check(session(lines, **changes))


def test_beside_a_training_fewer_prompts_may_do(session):
    few = {"train__evaluation": "{steps: 2, max_prompts: 10}", "evaluate__samples_per_prompt": 2}
    assert len(check_beside(session([*CLASSES, "3"], **few))) == 11
    with pytest.raises(inception.InceptionError, match="is not a file"):
        check_beside(session(list(CLASSES), evaluate__inception="/nowhere.pt"))
