"""`dmd report`: nothing to do until something that the page shows is another."""

import json
from typing import Any

import numpy as np
import pytest

from jobs import evaluate, report
from jobs.errors import Exit
from jobs.session import Session
from pipelines.storage import Store, open_store
from pipelines.stored_images import write_part
from pipelines.systems import Images
from tests.jobs.tiny_cli import run_tiny
from tests.pipelines.test_report import _metrics

REAL_REPORT = report.run


def _write_pictures(run: Store) -> None:
    nothing = np.zeros((4, 1), np.float32)
    prompts = ("a fox", "a whale", "an apple", "a flag")
    images = Images(prompts, (1, 2, 3, 4), nothing, np.zeros((4, 4, 4, 3), np.uint8), nothing)
    write_part(run, "evaluation/abc/teacher", 0, 4, images)


def _measured(exported: dict[str, Any]) -> dict[str, Any]:
    """metrics.json of the student of student.json."""
    metrics = _metrics()
    metrics["provenance"] |= {
        "student_revision": exported["student_revision"],
        "inputs": {"step": exported["step"]},
    }
    return metrics


@pytest.fixture
def dmd(tmp_path, capfd):
    """`dmd report` on an evaluated run of six steps: (exit code, what it said)."""
    run = open_store(str(tmp_path / "run"))
    _write_pictures(run)
    run.fs.pipe_file(run.path("metrics.json"), json.dumps(_metrics()).encode())
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text('{"step": 6, "loss_dm": 2.0}\n')

    def render(**changes: object) -> tuple[int, str]:
        return run_tiny("report", {"run.dir": tmp_path / "run"}, changes, capfd)

    render.folder, render.log = tmp_path / "run", log
    return render


def test_a_run_that_went_on_gets_another_page(dmd):
    assert dmd()[0] == Exit.OK
    page = (dmd.folder / "report.html").read_text()
    assert "nothing to do" in dmd()[1]
    with dmd.log.open("a") as log:
        log.write('{"step": 12, "pairs_version": 2, "pairs_rows": 64}\n')
    code, said = dmd()
    again = (dmd.folder / "report.html").read_text()
    assert code == Exit.OK and "nothing to do" not in said
    assert "After step 12" in again and "After step 12" not in page
    assert "nothing to do" in dmd()[1]


def test_what_an_earlier_release_left_and_a_changed_setting_get_another_page(dmd, monkeypatch):
    monkeypatch.setattr(report, "render_report", lambda inputs, template: str(len(inputs.prompts)))
    assert dmd()[0] == Exit.OK and (dmd.folder / "report.html").read_text() == "4"
    (dmd.folder / "report.json").write_text('{"report": "report.html", "metrics_sha256": "0"}')
    assert "nothing to do" not in dmd()[1]
    assert "nothing to do" not in dmd(evaluate__report_images=2)[1]
    assert (dmd.folder / "report.html").read_text() == "2"
    assert "nothing to do" in dmd(evaluate__report_images=2)[1]
    moved = dmd.folder.rename(dmd.folder.with_name("moved"))
    assert f"nothing to do, {moved / 'report.html'}" in dmd(
        run__dir=moved, evaluate__report_images=2
    )[1]  # fmt: skip


def test_figures_of_an_earlier_student_are_refused(dmd):
    """Trained on and exported again, not evaluated again."""
    before, now = ({"step": n, "student_revision": f"weights of {n}"} for n in (1000, 2000))
    (dmd.folder / "metrics.json").write_text(json.dumps(_measured(before)))
    (dmd.folder / "student.json").write_text(json.dumps(before))
    assert dmd()[0] == Exit.OK
    page = (dmd.folder / "report.html").read_bytes()
    for student in (now, before | {"student_revision": "weights of a step trained again"}):
        (dmd.folder / "student.json").write_text(json.dumps(student))
        code, said = dmd()
        assert code == Exit.REFUSED and "run `dmd evaluate` again" in said
        assert "are of another student (step 1000)" in said
        assert f"lies there now (step {student['step']}, student.json)" in said
        assert (dmd.folder / "report.html").read_bytes() == page
    (dmd.folder / "metrics.json").write_text(json.dumps(_measured(student)))
    assert dmd()[0] == Exit.OK


def test_a_chain_shows_the_student_that_it_evaluated_and_no_other(pipeline, monkeypatch):
    def measure(session: Session) -> None:
        _write_pictures(session.store)
        metrics = _measured(session.read_json("student.json") or {})
        session.store.fs.pipe_file(session.store.path("evaluation", "noise"), b"noise")
        session.write_json("metrics.json", metrics | {"noise": "evaluation/noise"})

    monkeypatch.setattr(evaluate, "run", measure)
    monkeypatch.setattr(report, "run", REAL_REPORT)
    for options in ((), ("--only", "report"), ("--from", "report")):
        code, said, _ = pipeline(*options)
        assert code == Exit.OK, said
    student = pipeline.latest() / "student.json"
    assert "a fox" in (student.parent / "report.html").read_text()
    exported = json.loads(student.read_text())
    student.write_text(json.dumps(exported | {"student_revision": "another"}))
    code, said, _ = pipeline("--only", "report")
    assert code == Exit.REFUSED and "pipeline --only evaluate" in said
