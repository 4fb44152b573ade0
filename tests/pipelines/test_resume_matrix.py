"""A run that is killed at any of its save points, or in the middle of a save, goes on as if nothing
had happened: every tensor, every sample, every line of its log."""

import shutil
from pathlib import Path

import pytest
import torch

from dmd_core.checkpoint import (
    MARKER,
    Checkpoint,
    CheckpointError,
    checkpoint_path,
    load_checkpoint,
    save_checkpoint,
)
from dmd_core.networks import DmdNetworks
from dmd_core.parallel import World
from dmd_core.teacher import load_teacher
from pipelines.run_checkpoints import RunCheckpoints
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import Store, open_store
from pipelines.train_config import TrainSection
from pipelines.train_settings import trainer_settings
from pipelines.workers import Group
from tests.pipelines.gloo_runs import Death, samples_of
from tests.pipelines.run_bench import (
    DMD,
    DMD2,
    PARTS,
    RECIPES,
    ROWS,
    STEPS,
    Bench,
    Run,
    close_lines,
    close_tensors,
    same_tensors,
    shared_bench,
)

# Two workers add up in a fixed order, but nobody promises that.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def bench(tiny_teacher_dir) -> Bench:
    return shared_bench(tiny_teacher_dir)


# ---------------------------------------------------------------------- a killed run goes on


def dies_and_goes_on(bench: Bench, name: str, size: int, deaths: list[Death]) -> None:
    """The same command again and again: it dies as told each time, and then may end."""
    recipe, store = RECIPES[name], bench.store()
    straight = bench.straight(recipe, size)
    expected, starts = samples_of(straight.outcome), {0}
    for death in deaths:
        run = bench.start(recipe, size, store, death)
        _went_on(run, starts, expected)
        assert run.outcome.codes[death.rank] == (1 if death.how == "interrupt" else -9)
        # The save that was torn left nothing; after a Ctrl-C it may have come to its end.
        torn = {death.step - 1} if death.torn else {death.step}
        starts = torn | {death.step} if death.how == "interrupt" else torn
    run = bench.start(recipe, size, store)
    _went_on(run, starts, expected)
    _equal(run, straight, name, exact=size == 1)


def _went_on(run: Run, starts: set[int], expected: dict) -> None:
    """From the newest complete checkpoint, and with the samples of the undisturbed run."""
    if run.outcome.steps:
        assert run.outcome.steps[0] in starts, run.outcome.said[-2000:]
    else:
        assert STEPS in starts  # nothing was left to do
    for step, samples in samples_of(run.outcome).items():
        assert samples == expected[step], step


def _equal(run: Run, straight: Run, name: str, *, exact: bool) -> None:
    assert run.outcome.live.keys() == PARTS[name]
    found, expected = run.checkpoint(), straight.checkpoint()
    assert found.state == expected.state and found.state["finished"]
    assert run.committed == straight.committed == list(range(1, STEPS + 1))
    steps = [line["step"] for line in run.lines if "loss_fake" in line]
    assert steps == list(range(1, STEPS + 1))  # no gap, and none twice
    if exact:
        same_tensors(run.outcome.live, straight.outcome.live)
        for step in run.committed:
            same_tensors(run.checkpoint(step).parts, straight.checkpoint(step).parts)
        assert run.lines == straight.lines
    else:
        start = straight.outcome.begun
        close_tensors(run.outcome.live, straight.outcome.live, start, ROUNDING)
        close_tensors(found.parts, expected.parts, start, ROUNDING)
        close_lines(run.lines, straight.lines, ROUNDING)


def test_one_worker_dies_at_each_kind_of_save_point(bench):
    deaths = [
        Death(1),  # the first step
        Death(2, "ema"),  # in the save at the end of a stage; the next has other fake updates
        Death(4, "fake_optimizer", "interrupt"),
        Death(STEPS),
    ]
    dies_and_goes_on(bench, "dmd2", 1, deaths)


@pytest.mark.slow
def test_what_is_kept_is_float32_where_networks_compute_in_bfloat16(bench):
    store, recipe = bench.store(), DMD2 | {"mixed_precision": "bf16"}
    straight = bench.straight(recipe)
    bench.start(recipe, 1, store, Death(3, "ema"))
    run = bench.start(recipe, 1, store)
    _equal(run, straight, "dmd2", exact=True)
    for part, tensors in run.checkpoint().parts.items():
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float32}, part
    in_float32 = bench.straight(DMD2).outcome.live["generator"]
    weights = run.outcome.live["generator"]
    assert any(not torch.equal(weights[name], in_float32[name]) for name in weights)


@pytest.mark.slow  # the chaos suite kills workers of Ray Train
def test_two_workers_die_with_one_of_them(bench):
    # In the middle of the second version's first epoch, and in a save of its second epoch.
    dies_and_goes_on(bench, "dmd", 2, [Death(4, rank=1), Death(6, "generator", rank=1)])


POINTS = [
    Death(1),  # the first step
    Death(2),  # a stage's end, more fake updates, another version of the pairs
    Death(4),  # in the middle of an epoch
    Death(5),  # a stage's end, fewer fake updates
    Death(6),
    Death(STEPS),
    Death(4, "fake"),
    Death(2, "generator_optimizer"),
    Death(STEPS, "generator"),
    Death(5, "fake", "interrupt"),
    Death(STEPS, "generator", "interrupt"),
]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("death", POINTS, ids=lambda d: f"{d.how} at {d.step} {d.torn}".strip())
def test_every_save_point(bench, name, size, death):
    dies_and_goes_on(bench, name, size, [death])


# ---------------------------------------------------------------------- what others got wrong


def test_the_average_is_not_the_weights(bench):
    """After a resume the student still has the trained weights, the average its own."""
    run = bench.straight(DMD2)
    live, saved = run.outcome.live, run.checkpoint().parts
    assert set(saved) == PARTS["dmd2"]
    same_tensors(saved, {p: {n: live[p][n] for n in ts} for p, ts in saved.items()})
    average, weights = live["ema"], live["generator"]
    moved = [name for name in average if not torch.equal(average[name], weights[name])]
    assert len(moved) > 0.9 * len(average)


def test_an_epoch_is_not_the_first_one_again(bench):
    """What a resumed run is compared with: each pair once, then all again in another order."""
    seen = samples_of(bench.straight(DMD).outcome)
    pairs = [row for step in seen if step >= 2 for row in seen[step]["pair_eps"]]
    first, second = pairs[: sum(ROWS)], pairs[sum(ROWS) :]
    assert len(set(first)) == sum(ROWS) and set(second) <= set(first)
    assert len(set(second)) == len(second) == 8 and second != first[:8]


@pytest.fixture
def left(bench, tmp_path) -> Store:
    """A copy of a run's folder, with the checkpoints of its last two steps."""
    source, target = bench.straight(DMD2).store, tmp_path / "run"
    for step in (STEPS - 1, STEPS):
        folder = checkpoint_path(CHECKPOINTS, step)
        shutil.copytree(source.path(folder), target / folder)
    return open_store(str(target))


@pytest.fixture(scope="module")
def networks(tiny_teacher_dir) -> DmdNetworks:
    """Of the same run, as it starts."""
    section = TrainSection.model_validate(DMD2 | {"real_pictures": "unread"})
    torch.set_num_threads(1)
    return DmdNetworks(load_teacher(tiny_teacher_dir), trainer_settings(section, 7), World())


def _opened(store: Store, networks: DmdNetworks) -> RunCheckpoints:
    return RunCheckpoints(store, networks, Group(0, 1), keep=9, also=lambda committed: ())


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


FILES = [f"{part}-00000.safetensors" for part in sorted(PARTS["dmd2"])]
FILES += ["index.json", "state.json"]


# Without its marker a checkpoint is a save that was not finished.
HARMS = [*((file, _flip) for file in FILES), (MARKER, _flip), (MARKER, _cut)]
HARMS += [(file, spoil) for file in (FILES[0], "state.json") for spoil in (_cut, Path.unlink)]


@pytest.mark.parametrize(("file", "spoil"), HARMS)
def test_what_cannot_be_read_never_becomes_step_0(left, networks, file, spoil):
    folder = Path(left.path(checkpoint_path(CHECKPOINTS, STEPS)))
    before = {path.name for path in folder.iterdir()}
    spoil(folder / file)
    checkpoints = _opened(left, networks)
    with pytest.raises(CheckpointError, match=f"--from previous.* step {STEPS - 1}"):
        step = checkpoints.newest([])
        assert step == STEPS
        checkpoints.restore(step)
    gone = {file} if spoil is Path.unlink else set()
    assert {path.name for path in folder.iterdir()} == before - gone
    assert checkpoints.committed() == [STEPS - 1, STEPS]


def test_the_loop_does_not_train_past_what_it_cannot_read(bench, left):
    _flip(Path(left.path(checkpoint_path(CHECKPOINTS, STEPS), "generator-00000.safetensors")))
    outcome = bench.attempt(DMD2, 1, left)
    assert outcome.codes == [1] and outcome.steps == [] and "--from previous" in outcome.said
    assert not left.fs.exists(left.path("metrics.jsonl"))


@pytest.mark.parametrize("part", sorted(PARTS["dmd2"]))
def test_a_state_that_lacks_a_part_is_refused(left, networks, part):
    """An optimizer, an average: what is missing is not made up."""
    root = left.path(CHECKPOINTS)
    whole = load_checkpoint(left.fs, root)
    assert whole is not None
    parts = {name: tensors for name, tensors in whole.parts.items() if name != part}
    save_checkpoint(left.fs, root, Checkpoint(STEPS, parts, whole.state))
    with pytest.raises(CheckpointError, match=part):
        _opened(left, networks).restore(STEPS)


def test_an_optimizer_that_lost_its_memory_of_a_weight_is_refused(left, networks):
    root = left.path(CHECKPOINTS)
    whole = load_checkpoint(left.fs, root)
    assert whole is not None
    kept = dict(whole.parts["fake_optimizer"])
    lost = next(iter(kept)).rsplit(".", 1)[0]
    kept = {name: value for name, value in kept.items() if not name.startswith(f"{lost}.")}
    parts = whole.parts | {"fake_optimizer": kept}
    save_checkpoint(left.fs, root, Checkpoint(STEPS, parts, whole.state))
    with pytest.raises(CheckpointError, match=lost.replace(".", "[.]")):
        _opened(left, networks).restore(STEPS)


def test_restored_is_what_was_saved(left, networks):
    """Into live tensors: weights, both moments and the counter of every optimizer, the average."""
    state = _opened(left, networks).restore(STEPS)
    saved = load_checkpoint(left.fs, left.path(CHECKPOINTS))
    assert saved is not None and state == saved.state
    same_tensors(networks.parts(), saved.parts)
    for name, optimizer in networks.optimizers.items():
        counts = {float(entry["step"]) for entry in optimizer.state.values()}
        # Two fake updates a step but in the first stage; the head begins with the second.
        assert counts == {{"generator": 7.0, "fake": 2 + 5 * 2.0, "head": 5 * 2.0}[name]}
    for name, weight in networks.weights.items():
        assert torch.equal(weight, saved.parts["generator"][name])
