"""Evaluation beside the training: decisions on made-up results, one real evaluation, one fit."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import torch

from dmd_core.checkpoint import committed_steps, remove_checkpoint
from dmd_core.metrics import kid, regression_distance
from dmd_core.teacher import teacher_revision
from jobs.errors import JobError
from jobs.export import _chosen
from pipelines import beside
from pipelines.beside import Beside, evaluate_once, finish_evaluations, unplaceable
from pipelines.beside_results import (
    Evaluated,
    best,
    drop_results_after,
    kept_steps,
    pending_evaluations,
    read_results,
    update_best,
    waiting_steps,
    without_gain,
    write_result,
)
from pipelines.beside_settings import EvaluationSection
from pipelines.beside_task import evaluate_checkpoint, evaluation_task, measurable
from pipelines.config import EvaluateSection, PairsSection, StorageSection
from pipelines.storage import open_store
from pipelines.stored_images import open_images
from pipelines.systems import START, TEACHER, TEACHER_AGAIN, Networks, SystemSampler
from pipelines.train_config import TrainSection
from tests.pipelines.beside_runs import fit, save_student

PROMPTS = tuple(f"a {colour} {thing}" for colour in ("red", "green", "grey") for thing in "abcd")
SECTION = EvaluationSection(steps=2, max_prompts=10)


def result(step: int, value: float | None, metric: str = "kid", **more) -> Evaluated:
    entry = None if value is None else {"value": value, "low": value - 9, "high": value + 9}
    return Evaluated(step, {metric: entry}, {"inputs": "same"}, **more)


def failed(step: int) -> Evaluated:
    return Evaluated(step, {}, {"inputs": "same"}, error="no memory")


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "run"))


@pytest.fixture
def task(tiny_teacher_dir, store):
    found = evaluation_task(
        SECTION,
        TrainSection(),
        evaluate=EvaluateSection(batch_size=4),
        pairs=PairsSection(steps=3, guidance_scale=3.0),
        storage=StorageSection(),
        run=store.url,
        teacher=tiny_teacher_dir,
        teacher_revision=teacher_revision(tiny_teacher_dir),
        prompts=PROMPTS,
    )
    assert found is not None
    return found


# ---------------------------------------------------------------------- decisions


@pytest.mark.parametrize(("metric", "expected"), [("kid", 4), ("rmse", 4), ("retrieval", 6)])
def test_the_best_is_least_distance_or_most_retrieval(metric, expected):
    values = {2: 0.3, 4: 0.1, 6: 0.5, 8: 0.2}
    assert best([result(s, v, metric) for s, v in values.items()], metric) == expected


def test_of_equal_values_the_earlier_is_the_best_and_no_value_never_is():
    found = [result(2, None), failed(4), result(6, float("nan")), result(8, 1.0), result(10, 1.0)]
    assert best(found, "kid") == 8
    assert best(found[:3], "kid") is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, 2.0, 1.0], 0),
        ([3.0, 2.0, 2.1], 1),
        ([3.0, 2.0, 2.0, 2.5], 2),  # equal is no gain
        ([3.0, 2.0, 2.1, 1.9], 0),  # better since, within the interval
        ([None, None], 2),  # a diverged run has no finite value
        ([], 0),
    ],
)
def test_evaluations_without_a_better_value_are_counted(values, expected):
    found = [result(2 * i, value) for i, value in enumerate(values, 1)]
    assert without_gain(found, "kid") == expected


def test_failed_evaluations_do_not_count_as_without_gain():
    assert without_gain([result(2, 1.0), failed(4), failed(6), result(8, 2.0)], "kid") == 1


@pytest.mark.parametrize(
    ("waiting", "limit", "expected"),
    [
        ([], 3, [4]),
        ([8, 10], 3, [4, 8, 10]),
        ([8, 10, 12, 14, 16], 3, [4, 8, 14, 16]),
        ([8, 10, 12], 1, [4, 8]),
    ],
)
def test_the_best_and_those_that_wait_are_kept(waiting, limit, expected):
    section = EvaluationSection(steps=2, waiting_checkpoints_limit=limit)
    found = [result(2, 0.3), result(4, 0.1), result(6, 0.2)]
    assert kept_steps(found, waiting, section) == expected


def test_as_many_of_the_best_are_kept_as_asked():
    section = EvaluationSection(steps=2, best_checkpoints_limit=2)
    assert kept_steps([result(2, 0.3), result(4, 0.1), result(6, 0.2)], [], section) == [4, 6]


def test_every_kth_checkpoint_waits_and_the_one_that_ends_the_run():
    section = EvaluationSection(steps=4)
    assert waiting_steps([2, 4, 6, 8, 9], [result(4, 0.1)], section) == [8]
    assert waiting_steps([0, 4], [], section) == [4]  # nothing is trained at step 0
    assert waiting_steps([2, 4, 6, 8, 9], [failed(8)], section, finished=True) == [4, 9]
    assert waiting_steps([4, 8], [], EvaluationSection(), finished=True) == []


def test_the_section_wants_steps_that_have_checkpoints():
    SECTION.check(1)
    EvaluationSection().check(500)
    with pytest.raises(ValueError, match=r"steps \(2\) must be a multiple .* \(4\)"):
        SECTION.check(4)


def test_resources_that_the_cluster_does_not_have_are_named():
    assert unplaceable(SECTION, {"CPU": 1}) == ""
    assert "num_gpus is 1, the cluster has 0" in unplaceable(
        EvaluationSection(num_gpus=1), {"CPU": 8}
    )


# ---------------------------------------------------------------------- files


def test_results_come_back_as_they_were_written(store):
    both = [result(12, 0.5), failed(2)]
    for one in both:
        write_result(store, one)
    assert read_results(store, "same") == both[::-1]
    assert read_results(store, "other prompts") == []
    content = json.loads(Path(store.path("validation", "step_00000012.json")).read_text())
    assert content["metrics"]["kid"] == {"value": 0.5, "low": -8.5, "high": 9.5}


def test_a_value_that_is_not_finite_is_null_and_none(store):
    write_result(store, result(2, float("nan")))
    (found,) = read_results(store, "same")
    assert found.value("kid") is None
    assert found.values() == {}


def test_an_unreadable_result_is_due_again(store):
    write_result(store, result(2, 0.5))
    write_result(store, result(4, 0.5))
    Path(store.path("validation", "step_00000002.json")).write_text('{"step": 2')
    assert pending_evaluations(store, [2, 4, 6], SECTION, "same") == [2, 6]


def test_best_json_follows_the_results(store):
    assert update_best(store, SECTION, "same") is None
    write_result(store, result(2, 0.5))
    write_result(store, result(4, 0.25))
    expected = {"step": 4, "metric": "kid", "value": 0.25, "file": "validation/step_00000004.json"}
    assert update_best(store, SECTION, "same") == expected
    assert json.loads(Path(store.path("best.json")).read_text()) == expected
    drop_results_after(store, 2)
    assert (update_best(store, SECTION, "same") or {})["step"] == 2
    drop_results_after(store, 0)
    assert update_best(store, SECTION, "same") is None
    assert not Path(store.path("best.json")).exists()


def test_results_and_pointers_on_s3(s3_store, tmp_path):
    write_result(s3_store, result(2, 0.5))
    assert read_results(s3_store, "same") == [result(2, 0.5)]
    assert (update_best(s3_store, SECTION, "same") or {})["step"] == 2
    (tmp_path / "pointer.json").write_text("{}")
    target = s3_store.path("ray", "pointer")
    s3_store.arrow.create_dir(target)  # as Ray Train stores a reported folder
    pyarrow.fs.copy_files(
        str(tmp_path), target, source_filesystem=pyarrow.fs.LocalFileSystem(),
        destination_filesystem=s3_store.arrow, use_threads=False,
    )  # fmt: skip
    assert s3_store.fs.cat_file(f"{target}/pointer.json") == b"{}"


# ---------------------------------------------------------------------- what dmd export takes


@pytest.mark.parametrize(
    ("asked", "best_step", "expected"),
    [
        (None, None, 8), (None, 4, 4), (None, 2, 8), ("last", 4, 8), ("best", 4, 4), ("6", 4, 6)
    ],
)  # fmt: skip
def test_export_takes_the_best_where_there_is_one(asked, best_step, expected, store):
    assert _chosen(_session(store, asked, best_step), [4, 6, 8])[0] == expected


@pytest.mark.parametrize(
    ("asked", "best_step", "words"),
    [("best", None, "no best.json"), ("best", 2, "step 2"), ("7", 4, "step 7"), ("new", 4, "new")],
)
def test_export_refuses_what_is_not_there(asked, best_step, words, store):
    with pytest.raises(JobError, match=words):
        _chosen(_session(store, asked, best_step), [4, 6, 8])


def _session(store, asked, best_step) -> Any:
    found = None if best_step is None else {"step": best_step, "metric": "kid", "value": 0.1}
    return SimpleNamespace(
        store=store, arguments=SimpleNamespace(checkpoint=asked), read_json=lambda _: found
    )


# ---------------------------------------------------------------------- one evaluation


@pytest.fixture
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_an_untrained_checkpoint_measures_as_the_start_does(task, store, _one_thread):
    save_student(task, 2)
    found = evaluate_checkpoint(task, 2)
    prompts = PROMPTS[:10]
    sampler = SystemSampler(task.plan(), Networks(task.teacher, "", StorageSection()))
    images = {
        system: sampler(system, prompts, task.plan().seeds(system, prompts))
        for system in (START, TEACHER, TEACHER_AGAIN)
    }
    expected = kid(images[START].features, images[TEACHER_AGAIN].features)
    assert found.metrics["kid"] == pytest.approx(asdict(expected), rel=0.05, abs=1e-6)
    start, teacher = (images[s].pictures.astype(np.float32) / 255 for s in (START, TEACHER))
    expected = regression_distance(start, teacher)
    assert found.metrics["rmse"] == pytest.approx(asdict(expected), rel=0.05)
    assert found.metrics["retrieval"] is None  # no gallery
    found_by, here = EvaluationSection(metric="retrieval"), task.teacher
    assert "no gallery" in measurable(found_by, EvaluateSection(), here, prompts)
    inception = EvaluateSection(features="inception")
    assert "compares latents" in measurable(found_by, inception, here, prompts)
    assert measurable(EvaluationSection(metric="kid"), inception, here, prompts) == ""
    few = measurable(EvaluationSection(), EvaluateSection(samples_per_prompt=20), here, ("cat",))
    assert "gives 1 distinct prompts; expected at least 10" in few
    stored = open_images(store.at("evaluation", task.inputs), "teacher").first(4)
    batch = sampler(TEACHER, prompts[:4], task.plan().seeds(TEACHER, prompts[:4]))
    np.testing.assert_array_equal(stored.pictures, batch.pictures)
    assert sorted(path.name for path in Path(store.path("evaluation", task.inputs)).iterdir()) == [
        "teacher", "teacher_again"
    ]  # fmt: skip


def test_other_prompts_or_another_teacher_are_other_inputs(task):
    def inputs(**changes):
        settings = {
            "section": SECTION, "train": TrainSection(), "evaluate": EvaluateSection(batch_size=4),
            "pairs": PairsSection(steps=3, guidance_scale=3.0), "storage": StorageSection(),
            "run": "elsewhere", "teacher": task.teacher, "prompts": PROMPTS,
            "teacher_revision": task.teacher_revision,
        }  # fmt: skip
        found = evaluation_task(**(settings | changes))
        assert found is not None
        return found.inputs

    assert inputs() == inputs(section=EvaluationSection(steps=4, max_prompts=10)) == task.inputs
    others = [
        inputs(prompts=PROMPTS[1:]),
        inputs(teacher_revision="0"),
        inputs(evaluate=EvaluateSection(batch_size=4, seed=1)),
        inputs(pairs=PairsSection(steps=4, guidance_scale=3.0)),
    ]
    assert len({task.inputs, *others}) == 5


# ---------------------------------------------------------------------- the loop's side


def test_a_resumed_run_takes_up_what_was_cut_short(task, store):
    for step in (2, 4, 6):
        save_student(task, step)
    mine = {"inputs": task.inputs}
    write_result(store, replace(result(2, 0.5), provenance=mine))
    write_result(store, replace(result(8, 0.1), provenance=mine))  # its checkpoint was lost
    loop = Beside(task, store, rank=0, share=lambda found: found)
    loop.resume(6)
    assert loop._begun == [4, 6]
    assert [found.step for found in loop.results()] == [2]
    assert json.loads(Path(store.path("best.json")).read_text())["step"] == 2
    assert loop.kept() == [2, 4, 6]
    save_student(task, 7)
    loop.resume(7, finished=True)
    assert loop._begun == [4, 6, 7]


def test_without_evaluation_nothing_is_asked_or_shared(store):
    loop = Beside(None, store, rank=0, share=lambda found: pytest.fail("shared"))
    loop.resume(6)
    loop.saving(6, finished=True)
    assert not loop.wanted(6, finished=True)
    assert loop.advance() == beside.News()
    assert loop.kept() == []


def test_a_save_that_failed_is_not_waited_for(task, store, monkeypatch):
    reported = []
    monkeypatch.setattr(Beside, "_report", lambda self, step: reported.append(step))
    loop = Beside(task, store, rank=0, share=lambda found: found)
    loop.saving(2)
    loop.advance()
    assert (reported, loop._begun) == ([], [2])  # under way still
    save_student(task, 4)
    loop.saving(4)
    loop.advance()
    assert (reported, loop._begun, loop._running) == ([4], [], [4])


def test_of_reported_ones_a_result_or_the_end_of_the_checkpoint_is_awaited(
    task, store, monkeypatch
):
    monkeypatch.setattr(Beside, "_report", lambda self, step: None)
    loop = Beside(task, store, rank=0, share=lambda found: found)
    for step in (2, 4, 6):
        save_student(task, step)
        loop.saving(step)
    assert loop.advance() == beside.News()
    assert loop._running == [2, 4, 6]
    write_result(store, replace(result(2, 0.5), provenance={"inputs": task.inputs}))
    remove_checkpoint(store.fs, store.path("checkpoints"), 6)
    assert [found.step for found in loop.advance().results] == [2]
    assert loop._running == [4]
    assert loop.advance().results == ()


def test_the_last_result_may_end_the_training(task, store, monkeypatch):
    monkeypatch.setattr(Beside, "_report", lambda self, step: None)
    task = replace(task, section=dict(task.section) | {"patience": 1})
    loop = Beside(task, store, rank=0, share=lambda found: found)
    for step, value in ((2, 0.5), (4, 0.6)):
        save_student(task, step)
        loop.saving(step)
        assert not loop.advance().stop
        write_result(store, replace(result(step, value), provenance={"inputs": task.inputs}))
    assert loop.advance().stop
    assert loop.stop()
    again = Beside(task, store, rank=0, share=lambda found: found)
    again.resume(4)
    assert again.stop()  # and after a kill
    again.resume(2)
    assert not again.stop()  # what was lost has no say


def test_a_checkpoint_is_evaluated_once_until_it_is_another(task, store, monkeypatch):
    calls = []

    def evaluated(task, step, then=lambda: None):
        calls.append(step)
        then()
        return replace(result(step, 0.5), provenance={"inputs": task.inputs})

    monkeypatch.setattr(beside, "_evaluated", evaluated)
    save_student(task, 2)
    assert evaluate_once(task, 2) == evaluate_once(task, 2)
    assert calls == [2]
    assert json.loads(Path(store.path("best.json")).read_text())["step"] == 2
    save_student(task, 2, rollbacks=1)
    evaluate_once(task, 2)
    assert calls == [2, 2]

    def rolled_back(task, step):  # while the evaluation runs
        return evaluated(task, step, lambda: save_student(task, step, rollbacks=2))

    monkeypatch.setattr(beside, "_evaluated", rolled_back)
    save_student(task, 4)
    assert evaluate_once(task, 4).error == "its checkpoint is gone"
    assert evaluate_once(task, 6).error == "its checkpoint is gone"
    assert calls == [2, 2, 4]
    assert [found.step for found in read_results(store, task.inputs)] == [2]


# ---------------------------------------------------------------------- on Ray


def _dies(task, step):
    with open(task.store().path("attempts"), "a") as file:
        file.write("x")
    os._exit(1)


@pytest.mark.slow
def test_an_evaluation_whose_process_dies_is_tried_once_more(ray_cluster, task, store, monkeypatch):
    save_student(task, 4)
    monkeypatch.setattr(beside, "evaluate_checkpoint", _dies)
    finish_evaluations(task, [4])
    assert Path(store.path("attempts")).read_text() == "xx"
    (lost,) = read_results(store, task.inputs)
    assert lost.step == 4
    assert "die" in lost.error


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_evaluated(ray_cluster, task, store):
    events, others = fit(task, cpus_per_worker=1)
    *steps, last = events
    early = [event["step"] for event in steps if event["running"] and event["markers"] == []]
    beside_it = [event["step"] for event in steps if event["running"] == [2]]
    assert early == []
    assert beside_it[0] == 4  # as soon as the marker is there
    assert len(beside_it) >= 10
    assert steps[-1]["results"] == [[2, ""]]
    assert [event.get("results") for event in others] == [event.get("results") for event in events]
    found = {one.step: one for one in read_results(store, task.inputs)}
    assert list(found) == [2, last["step"]]  # fit waited for the last one
    assert found[2].values() == found[last["step"]].values()
    assert json.loads(Path(store.path("best.json")).read_text())["step"] == 2


@pytest.mark.slow
def test_without_spare_resources_the_evaluation_waits_and_the_training_does_not(
    ray_cluster, task, store
):
    events, _ = fit(task, cpus_per_worker=4, most_steps=100)
    *steps, last = events
    assert [event["step"] for event in steps] == list(range(1, 101))
    assert all(event["results"] == [] for event in steps)
    assert all(event["running"] == [2] for event in steps[3:])
    written = Path(store.path("validation", "step_00000002.json")).stat().st_mtime
    assert written > last["seconds"]
    assert committed_steps(store.fs, store.path("checkpoints")) == [2, 100]
    assert [found.step for found in read_results(store, task.inputs)] == [2, 100]


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_costs_its_evaluation_alone(ray_cluster, task, store):
    events, _ = fit(task, cpus_per_worker=1, corrupt=True)
    ((step, error),) = events[-2]["results"]
    assert step == 2
    assert "does not match" in error or "checksum" in error
    found = {one.step: one.error for one in read_results(store, task.inputs)}
    assert found == {2: error, events[-1]["step"]: ""}
