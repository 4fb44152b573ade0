"""Stations 5-7 on real Ray Train: an interrupted run equals an undisturbed one, bit for bit, and
two workers see what one sees."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch

from dmd_core.checkpoint import Checkpoint, committed_steps, load_checkpoint
from dmd_core.health import Tally
from dmd_core.parallel import World
from dmd_core.teacher import load_teacher, teacher_revision
from pipelines.config import PairsSection, StorageSection
from pipelines.dataset_pins import read_pins
from pipelines.health_rules import HealthMonitor
from pipelines.health_settings import HealthRule, HealthSection
from pipelines.health_watch import StoppedError
from pipelines.lease import LeaseLostError, hold_lease
from pipelines.log_window import LogWindow
from pipelines.manifest import load_manifest
from pipelines.manifest_model import Manifest
from pipelines.preemption import PreemptionWatch
from pipelines.run_folder import CHECKPOINTS
from pipelines.stage_settings import StageKeys
from pipelines.storage import Store, open_store
from pipelines.train_config import TrainSection
from pipelines.training import _DmdRun, train_loop
from pipelines.workers import Group, run_worker_group
from tests.pipelines.dmd_runs import seal_pairs, write_pictures

ROWS = 24
PAIRS = PairsSection(steps=4, guidance_scale=2.0, batch_size=8, rows_per_block=8)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tiny_teacher_dir) -> tuple[Store, Manifest]:
    """A sealed data set of the tiny teacher's shape, made without Ray."""
    root = open_store(str(tmp_path_factory.mktemp("pairs")))
    return root, _seal(root, tiny_teacher_dir, range(1, ROWS + 1))


def _seal(root: Store, teacher_dir: str, ids: range, base: str = "a") -> Manifest:
    shape = load_teacher(teacher_dir).latent_shape()
    return seal_pairs(root, PAIRS, teacher_revision(teacher_dir), shape, ids, base=base)


@pytest.fixture
def train(pairs, tiny_teacher_dir, tmp_path, ray_cluster):
    root = pairs[0]

    def run(
        name: str,
        *,
        steps: int,
        workers: int = 1,
        digest: str | None = None,
        root: Store = root,
        fence: int = 0,
        **changes,
    ) -> Store:
        store = open_store(str(tmp_path / name))
        settings = {
            "num_workers": workers, "threads_per_worker": 1, "max_train_steps": steps,
            "max_failures": 0, "train_batch_size": 5, "regression_batch_size": 3,
            "learning_rate": 1e-3, "lr_warmup_steps": 3, "checkpointing_steps": 2,
            "checkpoints_total_limit": 10, "validation_steps": 3, "num_validation_images": 4,
            "logging_steps": 1,
        }  # fmt: skip
        section = TrainSection.model_validate(settings | changes)
        config = {
            "train": section.model_dump(), "pairs": PAIRS.model_dump(), "seed": 7,
            "storage": StorageSection().model_dump(), "dir": store.url, "root": root.url,
            "teacher": tiny_teacher_dir,
            "pins": {"default": 1, "versions": {1: digest or load_manifest(root, 1).digest}},
            "pin": {"name": name, "holder": "a test", "created": "now"},
            "fence": fence,
        }  # fmt: skip
        run_worker_group(
            train_loop, config, store=store, num_workers=workers, cpus_per_worker=1,
            use_gpu=False, max_failures=0, stored=lambda: None,
        )  # fmt: skip
        return store

    return run


def _final(store: Store) -> Checkpoint:
    found = load_checkpoint(store.fs, store.path(CHECKPOINTS))
    assert found is not None
    return found


def _losses(store: Store) -> list[dict]:
    return [
        json.loads(line) for line in store.fs.cat_file(store.path("metrics.jsonl")).splitlines()
    ]


def test_an_interrupted_run_equals_an_undisturbed_one_and_two_workers_equal_one(train):
    straight = train("straight", steps=6)
    resumed = train("resumed", steps=4)
    # As a kill between a checkpoint's files and its marker would leave it: back to step 2.
    resumed.fs.rm_file(resumed.path(CHECKPOINTS, "checkpoint-00000004", "MANIFEST.json"))
    resumed = train("resumed", steps=6)

    expected, found = _final(straight), _final(resumed)
    assert expected.step == found.step == 6
    assert expected.state == found.state
    for part, tensors in expected.parts.items():
        for name, value in tensors.items():
            assert torch.equal(value, found.parts[part][name]), f"{part}.{name}"
    assert committed_steps(resumed.fs, resumed.path(CHECKPOINTS)) == [2, 4, 6]
    # No gap and no double step in the metrics, and the same numbers.
    keys = ("step", "loss_dm", "loss_reg", "loss_fake", "generator_grad_norm")
    one = [{key: line[key] for key in keys} for line in _losses(straight)]
    assert one == [{key: line[key] for key in keys} for line in _losses(resumed)]
    assert [line["step"] for line in one] == list(range(1, 7))
    assert straight.fs.exists(straight.path("samples", "step_00000003.png"))
    # It moved: the student is not the teacher any more.
    assert any(
        not torch.equal(value, expected.parts["fake"][name])
        for name, value in expected.parts["generator"].items()
    )

    # Batches of 5 and 3 do not divide by two: the parts are unequal, the mean is not.
    two = [{key: line[key] for key in keys} for line in _losses(train("two", steps=6, workers=2))]
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6)


def test_workers_of_a_lost_lease_write_nothing(train, tmp_path):
    store = open_store(str(tmp_path / "taken"))
    with hold_lease(store, period_s=30, purpose="a training"):
        pass
    with hold_lease(store, period_s=30, purpose="another training"):
        with pytest.raises(Exception, match=r"lost its lease 1 \(lease 2 was taken by"):
            train("taken", steps=2, fence=1)
    assert not store.fs.exists(store.path(CHECKPOINTS))
    assert not store.fs.exists(store.path("metrics.jsonl"))


@pytest.mark.slow
def test_all_workers_go_over_to_a_newer_version_at_the_same_step(train, tiny_teacher_dir, tmp_path):
    root = open_store(str(tmp_path / "growing"))
    for base, ids in (("a", range(1, 8)), ("b", range(8, 13))):
        _seal(root, tiny_teacher_dir, ids, base)
    follow = {"follow_pairs": "epoch", "root": root, "checkpointing_steps": 1}
    one, two = train("one", steps=5, **follow), train("two", steps=5, workers=2, **follow)

    # 7 rows in batches of 3: the third ends past the epoch, and the fourth starts the segment.
    segments = _final(one).state["pairs_segments"]
    at = [(s["version"], s["pairs"], s["prompts"]) for s in segments]
    assert at == [(1, 0, 0), (2, 9, 15)]
    assert _final(two).state["pairs_segments"] == segments
    switches = [line for line in _losses(one) if "pairs_version" in line]
    assert switches == [{"step": 3, "pairs_version": 2, "pairs_rows": 12}]
    assert [line for line in _losses(two) if "pairs_version" in line] == switches
    for ours, theirs in zip(_losses(two), _losses(one), strict=True):
        for key in ours.keys() & {"loss_reg", "loss_dm"}:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4), (ours["step"], key)
    assert read_pins(root)["two"].versions == (1, 2)

    # Back to the step before the switch, and to the one after it.
    losses = [(line["step"], line.get("loss_reg")) for line in _losses(one)]
    for step in (2, 3):
        for lost in range(step + 1, 6):
            one.fs.rm_file(one.path(CHECKPOINTS, f"checkpoint-{lost:08d}", "MANIFEST.json"))
        again = train("one", steps=5, **follow)
        assert [(line["step"], line.get("loss_reg")) for line in _losses(again)] == losses


@pytest.mark.slow
def test_two_workers_equal_one_for_dmd2_with_gan_and_stages(train, tmp_path):
    pictures = write_pictures(tmp_path / "pictures", [f"prompt {index}" for index in range(4)])
    stages = [
        # Ends after one step, by its metric: what resumes must not ask again.
        {
            "steps": 9,
            "until": {"metric": "sample_std", "above": 0.0},
            "lambda_reg": 1.0,
            "pairs_in_dm": True,
        },
        {"steps": 2, "lambda_reg": 0.0, "gan_weight": 5e-3, "r1_weight": 0.1, "fake_updates": 2},
    ]
    changes = {
        "max_train_steps": None, "stages": stages, "real_pictures": pictures,
        "student_timesteps": (999, 499), "ema_halflife_samples": 10.0,
        "checkpointing_steps": 1,
    }  # fmt: skip
    one = _losses(train("gan_one", steps=0, **changes))
    two_store = train("gan_two", steps=0, workers=2, **changes)
    two = _losses(two_store)
    assert [line["stage"] for line in one] == [0, 1, 1]
    assert {"loss_gan", "loss_r1", "loss_discriminator"} <= one[1].keys()
    timing = {"samples_per_second", "data_wait"}
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - timing:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key

    # Killed right after the stage that ended by its metric: the next start is in the next stage.
    for step in committed_steps(two_store.fs, two_store.path(CHECKPOINTS))[1:]:
        name = f"checkpoint-{step:08d}"
        two_store.fs.rm_file(two_store.path(CHECKPOINTS, name, "MANIFEST.json"))
    again = _losses(train("gan_two", steps=0, workers=2, **changes))
    assert [line["stage"] for line in again] == [0, 1, 1]


def test_a_run_refuses_other_pairs_than_those_it_pinned(train):
    with pytest.raises(ray.train.TrainingFailedError, match="pinned"):
        train("other", steps=2, digest="0" * 64)


@pytest.mark.parametrize(("error", "waits"), [(StoppedError, True), (LeaseLostError, False)])
def test_a_run_that_is_stopped_waits_for_the_save_under_way(monkeypatch, error, waits):
    """Its workers are killed soon after they return; what another one took over is not ours."""
    closed: list[str] = []
    run: Any = object.__new__(_DmdRun)
    run.finished = False
    for name in ("checkpoints", "data", "log"):
        setattr(run, name, SimpleNamespace(close=lambda name=name: closed.append(name)))

    def stop() -> None:
        raise error("over")

    monkeypatch.setattr(run, "_begin", lambda: None)
    monkeypatch.setattr(run, "_run_stage", stop)
    with pytest.raises(error, match="over"):
        run.run()
    assert closed == ["checkpoints"] * waits + ["data", "log"]


def test_updates_that_are_left_out_are_counted_by_the_line():
    """Eleven in a week are nothing: rules judge the line before them, one without any, too."""
    run: Any = object.__new__(_DmdRun)
    run.group, run.trainer = Group(0, 1), SimpleNamespace(nonfinite_updates=7)
    run.networks = SimpleNamespace(world=World())
    run.data, run.preemption = SimpleNamespace(waited_s=0.0), PreemptionWatch()
    run.versions = SimpleNamespace(statistics=lambda: None)
    rule = HealthRule(metric="nonfinite_updates", above=1, windows=2, action="stop")
    monitor = HealthMonitor(HealthSection(rules=(rule,), warmup_steps=0))

    def verdict(step: int, left_out: int) -> Any:
        window = LogWindow(run.trainer.nonfinite_updates)
        window.add(Tally())
        run.trainer.nonfinite_updates += left_out
        metrics = run._measure(window, StageKeys())
        assert metrics["nonfinite_updates"] == left_out
        return monitor.look(step, metrics)

    assert [verdict(step, left_out) for step, left_out in enumerate((2, 0, 2, 1, 2))] == [None] * 5
    assert verdict(5, 2).since_step == 4
