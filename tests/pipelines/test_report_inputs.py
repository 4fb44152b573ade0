"""What a report is made from: the files that it reads, and the digests that stand for them."""

import json

import numpy as np
import pytest

from pipelines.beside_results import Evaluated, write_result
from pipelines.health_record import HealthEvent, add_event
from pipelines.report import collect_inputs, inputs_digests
from pipelines.sample_files import sample_path
from pipelines.storage import Store, open_store
from pipelines.stored_images import write_part
from pipelines.systems import Images

JSON_FILES = ("versions.json", "student.json")
SHOWN = {system: f"evaluation/abc/{system}" for system in ("teacher", "student", "start")}
NOT_SHOWN = "evaluation/abc/mean"


@pytest.fixture(params=["disk", "s3"])
def run(request, tmp_path) -> Store:
    """A run folder with every kind of file that a report shows; its log ends at step 20."""
    on_disk = request.param == "disk"
    store = open_store(str(tmp_path / "run")) if on_disk else request.getfixturevalue("s3_store")
    for folder in (*SHOWN.values(), NOT_SHOWN):
        _write_pictures(store, folder, 1)
    pictures = SHOWN | {"mean": NOT_SHOWN}
    _write(store, "metrics.json", {"pictures": pictures, "provenance": {"steps": 4}})
    for name in ("versions.json", "student.json", "best.json"):
        _write(store, name, {"of": name})
    _write_log(store, (10, 20))
    for step in (0, 10, 20, 30):
        store.fs.pipe_file(sample_path(store, step), b"png")
    _write_event(store, 10)
    _write_validation(store, 10, 0.5)
    return store


def _write(run: Store, name: str, content: object) -> None:
    run.fs.pipe_file(run.path(name), json.dumps(content).encode())


def _write_pictures(run: Store, folder: str, count: int, start: int = 0) -> None:
    nothing = np.zeros((count, 1), np.float32)
    pictures = np.zeros((count, 2, 2, 3), np.uint8)
    images = Images(("fox",) * count, (1,) * count, nothing, pictures, nothing)
    write_part(run, folder, start, start + count, images)


def _write_log(run: Store, steps: tuple[int, ...]) -> None:
    lines = "".join(json.dumps({"step": step, "loss_dm": 1.0}) + "\n" for step in steps)
    run.fs.pipe_file(run.path("metrics.jsonl"), lines.encode())


def _write_event(run: Store, step: int) -> None:
    rule = {"kind": "warn", "rule": "sample_std below 0.3", "metric": "sample_std", "value": 0.1}
    add_event(run, HealthEvent.model_validate({**rule, "step": step, "time": "t"}))


def _write_validation(run: Store, step: int, value: float) -> None:
    write_result(run, Evaluated(step, {"kid": {"value": value}}, {"inputs": "a"}))


def _digests(run: Store) -> dict[str, str]:
    return inputs_digests(run, json_files=JSON_FILES)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("metrics.json", lambda run: _write(run, "metrics.json", _other_metrics(run))),
        ("student.json", lambda run: _write(run, "student.json", {"of": "another"})),
        ("versions.json", lambda run: run.fs.rm_file(run.path("versions.json"))),
        ("best.json", lambda run: _write(run, "best.json", {"step": 20})),
        ("metrics.jsonl", lambda run: _write_log(run, (10, 20, 25))),
        ("health.json", lambda run: _write_event(run, 20)),
        ("validation", lambda run: _write_validation(run, 20, 0.5)),
        ("validation", lambda run: _write_validation(run, 10, 0.4)),  # as many bytes
        ("samples", lambda run: run.fs.pipe_file(sample_path(run, 15), b"png")),
        ("samples", lambda run: run.fs.pipe_file(sample_path(run, 20), b"another")),
        ("samples", lambda run: run.fs.rm_file(sample_path(run, 10))),
        (SHOWN["student"], lambda run: _write_pictures(run, SHOWN["student"], 1, start=1)),
        (SHOWN["start"], lambda run: _write_pictures(run, SHOWN["start"], 300)),
    ],
)
def test_whatever_the_page_shows_changes_its_digest_and_no_other(run, named, change):
    before = _digests(run)
    change(run)
    after = _digests(run)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {named}


def _other_metrics(run: Store) -> dict:
    metrics = json.loads(run.fs.cat_file(run.path("metrics.json")))
    return metrics | {"provenance": {"steps": 5}}


def test_what_the_page_does_not_show_changes_nothing(run):
    before = _digests(run)
    for name in ("report.html", "checkpoints/checkpoint-00000030/state.json"):
        run.fs.pipe_file(run.path(name), b"{}")
    run.fs.pipe_file(sample_path(run, 40), b"after the last line of the log")
    _write_pictures(run, NOT_SHOWN, 1, start=1)
    assert _digests(run) == before


def test_every_file_that_is_read_has_a_digest(run, monkeypatch):
    read, plain = [], run.fs.cat_file

    def cat_file(path, *args, **kwargs):
        read.append(path.removeprefix(f"{run.root}/"))
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(run.fs, "cat_file", cat_file)
    collect_inputs(run, title="t", images=1, json_files=JSON_FILES)
    monkeypatch.undo()
    covered, files = _digests(run), set(read)
    assert {"metrics.jsonl", "validation/step_00000010.json", "samples/step_00000020.png"} <= files
    assert not {f for f in files if not {f, f.rpartition("/")[0]} & covered.keys()}


def test_pictures_after_the_last_line_of_the_log_are_not_shown(run):
    def shown() -> list[int]:
        return [step for step, _ in collect_inputs(run, title="t", images=1).samples]

    assert shown() == [0, 10, 20]
    _write_log(run, (10, 20, 30))
    assert shown() == [0, 10, 20, 30]
    run.fs.rm_file(run.path("metrics.jsonl"))  # nothing says which of them were lost
    assert shown() == [0, 10, 20, 30]
