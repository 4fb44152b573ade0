"""One recipe on one worker or on four, whole networks or shards of them: the same samples, the same
losses and the same weights, also when the group or the placement changes in the middle of a run."""

from typing import Any

import pytest

from tests.pipelines.gloo_runs import Death, samples_of
from tests.pipelines.run_bench import (
    DMD,
    DMD2,
    Bench,
    Run,
    close_lines,
    close_tensors,
)
from tests.pipelines.test_resume_matrix import bench  # noqa: F401  (a fixture)

# float32 sums in another order: of the way a weight went in 20 steps, and of each loss.
# A head at 1×1 pixels with R1, a difference of near-equal logits, magnifies rounding; by how much
# depends on the session's teacher, whose learned vocabulary is another in every process. A wrong
# weight of a loss shows in the moments as a factor, not as a thousandth.
ROUNDING, MAGNIFIED = 1e-3, 1e-2

FSDP = {"generator": "fsdp", "fake": "fsdp", "teacher": "sharded"}
OFFLOAD = {**FSDP, "teacher": "offload", "gradient_checkpointing": True}
# 5 fresh samples and 4 pairs: uneven parts on 2, 3 and 4 workers.
ALL = {
    "gan_weight": 0.1,
    "r1_weight": 0.1,
    "fake_updates": 2,
    "pairs_in_dm": True,
    "ema_halflife_samples": 20.0,
    "max_train_steps": 20,
    "checkpointing_steps": 10,
}
LORA = {"trainable": "lora", "lora_rank": 2, "max_train_steps": 20, "checkpointing_steps": 10}


def placed(parallel: dict[str, Any]) -> dict[str, Any]:
    return {"parallel": parallel}


def same_run(run: Run, expected: Run) -> None:
    """As one worker alone did it, to rounding."""
    start = expected.outcome.begun
    close_tensors(run.outcome.live, expected.outcome.live, start, ROUNDING)
    close_tensors(run.checkpoint().parts, expected.checkpoint().parts, start, ROUNDING)
    close_lines(run.lines, expected.lines, ROUNDING)
    assert run.checkpoint().state == expected.checkpoint().state
    samples = samples_of(expected.outcome)
    for step, rows in samples_of(run.outcome).items():
        assert rows == samples[step], step


def moves(bench: Bench, recipe: dict, places: list[tuple[int, int, dict]]) -> Run:  # noqa: F811
    """A run that is killed at the first number of each place but the last, and then goes on on so
    many workers, with these changes of the recipe."""
    store = bench.store()
    for step, size, changes in places[:-1]:
        bench.start(recipe | changes, size, store, Death(step))
    last, size, changes = places[-1]
    run = bench.start(recipe | changes, size, store)
    assert run.outcome.steps == list(range(places[-2][0], last))
    return run


@pytest.mark.slow
def test_a_run_may_move_between_workers_and_placements(bench):  # noqa: F811
    """Saved by three, whole; gone on by two, in shards; then by one, whole again."""
    store, expected = bench.store(), bench.straight(DMD2)
    shards = placed(OFFLOAD) | {"micro_batch_size": 2}
    for step, size, changes in ((2, 3, {}), (4, 2, shards), (5, 1, {})):
        run = bench.start(DMD2 | changes, size, store, Death(step))
    found, wanted = run.checkpoint(5), expected.checkpoint(5)
    start = expected.outcome.begun
    close_tensors(found.parts, wanted.parts, start, MAGNIFIED, way=5 * MAGNIFIED)
    assert found.state == wanted.state
    close_lines(run.lines[:5], expected.lines[:5], MAGNIFIED)


def test_two_workers_see_what_one_sees(bench):  # noqa: F811
    same_run(bench.straight(DMD, 2), bench.straight(DMD))


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulated_gradients_are_those_of_the_whole_batch(bench, micro):  # noqa: F811
    """The moments of a first update are its gradients, whatever the optimizer makes of them."""
    recipe = ALL | {"max_train_steps": 1}
    run, whole = bench.straight(recipe | {"micro_batch_size": micro}), bench.straight(recipe)
    close_tensors(run.outcome.live, whole.outcome.live, whole.outcome.begun, ROUNDING)
    close_lines(run.lines, whole.lines, ROUNDING)


# ---------------------------------------------------------------------- all of it


@pytest.mark.slow
@pytest.mark.parametrize("micro", [None, 1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_workers(bench, size, micro):  # noqa: F811
    same_run(bench.straight(ALL | {"micro_batch_size": micro}, size), bench.straight(ALL))


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        FSDP,
        OFFLOAD,
        {"generator": "fsdp"},
        {"fake": "fsdp"},
        {"teacher": "sharded"},
        {"gradient_checkpointing": True},
    ],
    ids=lambda parallel: " ".join(f"{k}={v}" for k, v in parallel.items()),
)
@pytest.mark.parametrize(("size", "micro"), [(1, None), (2, 1), (3, None)])
def test_placements(bench, parallel, size, micro):  # noqa: F811
    recipe = ALL | placed(parallel) | {"micro_batch_size": micro}
    same_run(bench.straight(recipe, size), bench.straight(ALL))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "changes"),
    [(2, {}), (3, {"micro_batch_size": 1}), (1, placed(FSDP)), (2, placed(OFFLOAD))],
)
def test_adapters(bench, size, changes):  # noqa: F811
    same_run(bench.straight(LORA | changes, size), bench.straight(LORA))


@pytest.mark.slow
def test_adapters_on_a_network_in_bfloat16(bench):  # noqa: F811
    """Its shards are of two dtypes. One step, to bfloat16's rounding: it grows with the steps."""
    mixed = LORA | {"mixed_precision": "bf16", "max_train_steps": 1, "checkpointing_steps": 1}
    sharded = bench.straight(mixed | placed({"generator": "fsdp"}), 2).outcome
    whole = bench.straight(mixed, 2).outcome
    close_tensors(sharded.live, whole.live, whole.begun, 2**-7)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [ALL, LORA], ids=["all", "lora"])
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((4, {}), (1, {})),
        ((4, {}), (3, {})),
        ((1, {}), (4, {})),
        ((2, {}), (2, placed(FSDP))),
        ((2, placed(FSDP)), (2, {})),
        ((4, placed(FSDP)), (3, placed(OFFLOAD))),
        ((3, placed(OFFLOAD)), (1, {})),
    ],
)
def test_a_run_moves(bench, recipe, first, then):  # noqa: F811
    run = moves(bench, recipe, [(10, *first), (20, *then)])
    same_run(run, bench.straight(recipe))
