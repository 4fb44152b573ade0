"""A recipe that really collapses: the learning rate blows the samples up, nothing is injected."""

import json
import math

import pytest

from dmd_core.checkpoint import committed_steps, read_state
from pipelines.storage import open_store
from tests.jobs.tiny_cli import run_tiny

STEPS, LIMIT = 16, 1.5
RULE = f"{{metric: sample_std, above: {LIMIT}, windows: 2, action: rollback}}"
HEALTH = f"{{warmup_steps: 0, learning_rate_factor: 0.02, fake_updates_factor: 2, rules: [{RULE}]}}"


@pytest.fixture
def recipe(tiny_teacher_dir, tmp_path) -> dict[str, object]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\na blue whale\nwoman astronaut\ngreen apple\n")
    return {
        "run.dir": tmp_path / "run",
        "teacher.path": tiny_teacher_dir,
        "pairs.prompts": prompts,
        "train.lambda_reg": 0,
        "train.learning_rate": 0.05,
        "train.lr_warmup_steps": 0,
        "train.max_train_steps": STEPS,
    }


def _lines(tmp_path) -> list[dict]:
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow  # `tests/pipelines/test_rollback.py` goes back in the default suite
def test_a_collapse_is_rolled_back_and_the_run_finishes(ray_cluster, recipe, tmp_path, capfd):
    code, err = run_tiny("train", recipe, {"train__health": HEALTH}, capfd)
    assert code == 0, err
    events = json.loads((tmp_path / "run" / "health.json").read_text())["events"]
    assert events and {event["kind"] for event in events} == {"rollback"}
    assert err.count("went back to step") == len(events)
    for index, event in enumerate(events, start=1):
        assert event["to_step"] + 1 < event["step"] and event["value"] > LIMIT
        assert math.isclose(event["learning_rate_factor"], 0.02**index)
        assert event["fake_updates_factor"] == 2**index

    lines = _lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    after = [line["sample_std"] for line in lines if line["step"] > events[-1]["to_step"]]
    assert max(after) < LIMIT
    store = open_store(str(tmp_path / "run"))
    root = store.path("checkpoints")
    steps = committed_steps(store.fs, root)
    assert steps[-1] == STEPS
    assert read_state(store.fs, root, STEPS)["rollbacks"] == len(events)


@pytest.mark.slow
def test_a_rule_added_later_without_a_state_to_go_back_to(ray_cluster, recipe, tmp_path, capfd):
    """Without a rollback rule from the start, step 0 is not saved."""
    store = open_store(str(tmp_path / "run"))
    calm = {"train__learning_rate": 1e-4, "train__max_train_steps": 4}
    code, err = run_tiny("train", recipe, calm, capfd)
    assert code == 0, err
    before = committed_steps(store.fs, store.path("checkpoints"))
    always = HEALTH.replace(f"above: {LIMIT}", "above: 0")
    longer = calm | {"train__max_train_steps": 6, "train__health": always}
    code, err = run_tiny("train", recipe, longer, capfd)
    assert code == 3 and "no checkpoint from before step 1 is left to go back to" in err, err
    assert committed_steps(store.fs, store.path("checkpoints")) == before
    events = json.loads((tmp_path / "run" / "health.json").read_text())["events"]
    assert [(event["kind"], event["step"]) for event in events] == [("stop", 5)]


@pytest.mark.slow
def test_the_same_recipe_without_the_rule_does_collapse(ray_cluster, recipe, tmp_path, capfd):
    off = {"train__health": "{rules: []}", "train__max_train_steps": STEPS}
    code, err = run_tiny("train", recipe, off, capfd)
    assert code == 0, err
    assert max(line["sample_std"] for line in _lines(tmp_path)) > 2 * LIMIT


@pytest.mark.slow
def test_a_collapse_that_is_to_stop_the_run_ends_it_once(ray_cluster, recipe, tmp_path, capfd):
    stop = HEALTH.replace("rollback", "stop")
    code, err = run_tiny("train", recipe, {"train__health": stop}, capfd)
    assert code == 3
    assert "sample_std above 1.5 on 2 logged lines in a row" in err and "health.json" in err
    events = json.loads((tmp_path / "run" / "health.json").read_text())["events"]
    assert [event["kind"] for event in events] == ["stop"]
