"""A rollback in real processes: after it, two workers hold what one alone does."""

import json

import pytest

from tests.pipelines.run_bench import close_tensors
from tests.pipelines.test_resume_matrix import bench  # noqa: F401  (a fixture)
from tests.pipelines.test_worlds import MAGNIFIED

# The first update puts the weights beyond what float32 can multiply; no line is due before the
# updates that are left out for it are too many.
RECIPE = {
    "lambda_reg": 0.0,
    "gan_weight": 0.1,
    "ema_halflife_samples": 20.0,
    "learning_rate": 1e30,
    "lr_warmup_steps": 0,
    "max_train_steps": 5,
    "logging_steps": 100,
    "max_nonfinite_updates": 1,
    "health": {
        "warmup_steps": 0,
        "learning_rate_factor": 1e-34,
        "rules": [{"metric": "nonfinite_updates", "above": 0, "action": "rollback"}],
    },
}


def test_gradients_that_stay_non_finite_are_rolled_back_on_all_workers(bench):  # noqa: F811
    runs = [bench.start(RECIPE, size, bench.store()) for size in (1, 2)]
    for run in runs:
        assert set(run.outcome.codes) == {0}, run.outcome.said[-2000:]
        (event,) = json.loads(run.store.fs.cat_file(run.store.path("health.json")))["events"]
        assert (event["kind"], event["to_step"]) == ("rollback", 0)
        assert [line["step"] for line in run.lines] == [5]
        assert run.committed == [0, 1, 2, 3, 4, 5]
    alone, two = runs
    start = alone.outcome.begun
    assert {"ema", "head_optimizer"} <= set(two.checkpoint().parts)
    close_tensors(two.outcome.live, alone.outcome.live, start, MAGNIFIED)
    close_tensors(two.checkpoint().parts, alone.checkpoint().parts, start, MAGNIFIED)


@pytest.mark.parametrize(
    "rules", [[], [{"metric": "loss_fake", "below": -1, "action": "rollback"}]]
)
def test_without_a_rule_for_it_they_end_the_run(bench, rules):  # noqa: F811
    recipe = RECIPE | {"health": {"rules": rules, "warmup_steps": 0}}
    outcome = bench.attempt(recipe, 1, bench.store())
    assert outcome.codes == [1]
    assert "DivergedError" in outcome.said and "max_nonfinite_updates" in outcome.said
