"""A store that fails under a training's checkpoints: what is warned of, what ends the run."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from dmd_core.checkpoint import CheckpointError, committed_steps, load_checkpoint
from jobs.cli import main
from jobs.errors import Exit
from pipelines import patience, run_checkpoints
from pipelines.health_record import HealthRecordError, event_of
from pipelines.health_rules import Verdict
from pipelines.health_settings import HealthRule, HealthSection
from pipelines.run_checkpoints import RunCheckpoints
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import Store, open_store
from pipelines.workers import Group
from tests.faulty_store import Gate, Turn, disk_or_memory, every_index, gated

KEEP = 2


class Networks:
    """What a checkpoint needs of `DmdNetworks`, and small: all numbers of a part are equal."""

    def __init__(self) -> None:
        self.tensors = {part: {"w": torch.zeros(8)} for part in ("generator", "fake")}

    def parts(self) -> dict[str, dict[str, torch.Tensor]]:
        return self.tensors

    def fill(self, value: int) -> None:
        for tensors in self.tensors.values():
            tensors["w"].fill_(value)


@pytest.fixture
def networks() -> Networks:
    return Networks()


@pytest.fixture(params=["disk", "memory"])
def store(request, tmp_path) -> Store:
    return disk_or_memory(request.param, tmp_path)


class Loop:
    """A training whose every step makes all numbers of the student equal to the step."""

    def __init__(self, networks: Any, store: Store) -> None:
        self.networks, self.store = networks, store
        self.checkpoints = RunCheckpoints(
            store, networks, Group(0, 1), keep=KEEP, also=lambda committed: ()
        )

    def step(self, step: int, *, surely: bool = False) -> None:
        self.networks.fill(step)
        self.checkpoints.save(step, {"of": step}, surely=surely)


def stored(store: Store) -> list[int]:
    """Steps that are believed; each is loaded, and is what it says."""
    root, steps = store.path(CHECKPOINTS), committed_steps(store.fs, store.path(CHECKPOINTS))
    for step in steps:
        found = load_checkpoint(store.fs, root, step)
        assert found is not None and found.state == {"step": step, "of": step}
        assert all(torch.equal(t["w"], torch.full((8,), float(step))) for t in found.parts.values())
    return steps


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == run_checkpoints.__name__]


@pytest.mark.parametrize("what", ["fail before", "fail after"])
def test_a_fault_at_any_operation_of_a_save_costs_that_checkpoint_at_most(
    networks, store, what, caplog
):
    count = 0

    def attempt(gate: Gate) -> None:
        nonlocal count
        caplog.clear()
        fresh, count = store.at(f"at-{count}"), count + 1
        first = Loop(networks, fresh)
        first.step(1)
        first.step(2)
        first.checkpoints.close()
        with gated(fresh, gate) as faulty:
            loop = Loop(networks, faulty)
            loop.step(3)
            loop.checkpoints._saver._settle()
            gate.turns = {}
            after = stored(fresh)
            loop.step(4)
            loop.checkpoints.close()
        said = warnings(caplog)
        if any("was not saved" in each for each in said):
            assert after == [1, 2]
        else:
            assert after[-1] == 3
            assert all("old checkpoints may be left" in each for each in said)
        assert len(said) <= 1 and stored(fresh)[-1] == 4
        found = fresh.fs.ls(fresh.path(CHECKPOINTS), detail=False)
        assert [name[-8:] for name in sorted(found)] == [f"{s:08d}" for s in stored(fresh)]

    met = sum(1 for _ in every_index(attempt, what))
    assert met > 10, f"only {met} operations"


def test_a_full_disk(networks, tmp_path, monkeypatch, caplog):
    """As safetensors reports it, with half of the file written."""

    def full(tensors: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    store = open_store(str(tmp_path))
    loop = Loop(networks, store)
    loop.step(1)
    loop.checkpoints.settle()
    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        loop.step(2)
        loop.checkpoints.settle()
        assert stored(store) == [1]
        [said] = warnings(caplog)
        assert "checkpoint-00000002 was not saved" in said and "No space left" in said
    loop.step(3)
    assert (tmp_path / CHECKPOINTS / "checkpoint-00000002").exists()
    loop.checkpoints.close()
    assert stored(store) == [1, 3]
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == [
        "checkpoint-00000001",
        "checkpoint-00000003",
    ]


@contextmanager
def outage(store: Store) -> Iterator[tuple[Store, Callable[[bool], None]]]:
    """The store, and what turns it off (False) and on again."""
    gate, gone = Gate(), {index: Turn("fail before") for index in range(100_000)}

    def turn(on: bool) -> None:
        gate.turns = {} if on else gone

    with gated(store, gate) as faulty:
        yield faulty, turn


def test_a_store_that_is_gone_for_two_saves_is_a_warning_and_for_three_the_end(
    networks, store, caplog
):
    with outage(store) as (faulty, turn):
        loop = Loop(networks, faulty)
        loop.step(1)
        loop.checkpoints._saver._settle()
        for first in (2, 5):  # what succeeds in between starts the count anew
            turn(False)
            loop.step(first)
            loop.step(first + 1)
            loop.checkpoints._saver._settle()
            turn(True)
            loop.step(first + 2)
            loop.checkpoints._saver._settle()
        assert len(warnings(caplog)) == 4
        assert stored(store) == [4, 7]
        turn(False)
        for step in (8, 9, 10):
            loop.step(step)
        with pytest.raises(CheckpointError, match="checkpoint-00000010 was not saved"):
            loop.step(11)
        loop.checkpoints.close()
    assert stored(store) == [4, 7]


@pytest.mark.parametrize("tries", [2, 4, 5])
def test_the_last_save_is_tried_again(networks, store, monkeypatch, tries):
    """`tries`: those that fail. The pauses are the way the store gets time to come back."""
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        turn(len(pauses) >= tries)

    monkeypatch.setattr(patience.time, "sleep", pause)
    with outage(store) as (faulty, turn):
        loop = Loop(networks, faulty)
        loop.step(1)
        loop.checkpoints._saver._settle()
        turn(False)
        if tries > len(patience.PAUSES_S):
            with pytest.raises(CheckpointError, match="checkpoint-00000002 was not saved"):
                loop.step(2, surely=True)
        else:
            loop.step(2, surely=True)
        loop.checkpoints.close()
    assert stored(store) == ([1] if tries > len(patience.PAUSES_S) else [1, 2])
    assert pauses == list(patience.PAUSES_S[: len(pauses)])
    assert sum(patience.PAUSES_S) > 60, "a store may be gone for a minute"


def test_old_checkpoints_that_stay_cost_no_new_one(networks, store, monkeypatch, caplog):
    """Neither is the run ended for them, nor the last checkpoint written twice."""

    def refuse(*arguments: object) -> None:
        raise OSError("refused")

    monkeypatch.setattr(run_checkpoints, "prune_checkpoints", refuse)
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: pytest.fail("saved again"))
    loop = Loop(networks, store)
    for step in range(1, 6):
        loop.step(step, surely=step == 5)
    loop.checkpoints.close()
    assert stored(store) == [1, 2, 3, 4, 5]
    said = warnings(caplog)
    assert len(said) == 5 and all("old checkpoints may be left" in each for each in said)


def test_a_save_that_fails_before_a_rollback_is_told(networks, store, caplog):
    with outage(store) as (faulty, turn):
        loop = Loop(networks, faulty)
        loop.step(1)
        loop.checkpoints.settle()
        turn(False)
        loop.step(2)
        loop.checkpoints.settle()
        assert [w for w in warnings(caplog) if "checkpoint-00000002 was not saved" in w]
        turn(True)
        loop.checkpoints.close()
    assert stored(store) == [1]


def test_nothing_is_dropped_where_there_is_nothing_to_go_back_to(networks, store):
    loop = Loop(networks, store)
    loop.step(1)
    loop.step(2)
    assert loop.checkpoints.goal(_verdict(since_step=2)) is None
    with pytest.raises(CheckpointError, match="no checkpoint of step 0 to go back to; it has 1, 2"):
        loop.checkpoints.drop_after(0)
    assert stored(store) == [1, 2]
    goal = loop.checkpoints.goal(_verdict(since_step=3))
    assert goal == 1
    loop.checkpoints.drop_after(goal)
    assert stored(store) == [1]


def test_a_rollback_whose_checkpoint_is_gone_costs_none_of_the_others(networks, store):
    loop = Loop(networks, store)
    loop.step(3)
    loop.checkpoints.settle()
    event = event_of(_verdict(since_step=3), (), HealthSection(), time="t", to_step=1)
    with pytest.raises(HealthRecordError, match="checkpoint is gone; those of steps 3 are"):
        loop.checkpoints.newest([event])
    assert stored(store) == [3]


def _verdict(since_step: int) -> Verdict:
    rule = HealthRule.model_validate({"metric": "sample_std", "below": 1, "action": "rollback"})
    return Verdict(rule, "rollback", since_step, 0.1, since_step)


# ---------------------------------------------------------------- at the command line


@pytest.fixture
def train(ray_cluster, tiny_teacher_dir, tmp_path, capfd):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {index}" for index in range(12)))

    def run(*arguments: str, steps: int) -> tuple[int, str]:
        settings = {
            "run.dir": tmp_path / "run", "teacher.path": tiny_teacher_dir,
            "pairs.prompts": prompts, "train.lambda_reg": 0, "train.max_train_steps": steps,
            "train.validation_steps": 100, "train.report_to": "none",
        }  # fmt: skip
        command = ["train", "--config", "tiny", *arguments]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        code = main(command)
        return code, capfd.readouterr().err

    run.folder = tmp_path / "run"
    return run


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_ends_the_run_and_from_previous_goes_on(train):
    assert train(steps=4)[0] == Exit.OK
    newest = train.folder / CHECKPOINTS / "checkpoint-00000004"
    damaged = newest / "generator-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)

    starts = groups_started()
    code, said = train(steps=6)
    assert code == Exit.REFUSED, said
    assert f"{damaged} does not match its checksum" in said
    assert "run again with --from previous to go on from step 2" in said
    assert groups_started() == starts + 1, "what cannot succeed was tried again"
    assert damaged.read_bytes() == content, "the evidence is gone"

    code, said = train("--from", "previous", steps=6)
    assert code == Exit.OK and "step 4 is put aside" in said and "step 2 is the newest" in said
    store = open_store(str(train.folder))
    found = load_checkpoint(store.fs, store.path(CHECKPOINTS))
    assert found is not None and found.step == 6
    lines = (train.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))

    code, said = train("--from", "previous", steps=6)  # as a scheduler would repeat it
    assert code == Exit.OK and "none is put aside" in said and "nothing to do" in said

    # An older one is read, too, by a run that goes on.
    state = newest / "state.json"
    state.write_bytes(state.read_bytes()[:-1])
    code, said = train(steps=8)
    assert code == Exit.REFUSED and "--from previous to go on from step 6" in said, said
    code, said = train("--from", "previous", steps=8)
    assert code == Exit.OK and "step 4 is put aside" in said and "going on from step 6" in said


def groups_started() -> int:
    """By Ray Train, since its Ray of this process started."""
    import ray

    logs = Path(ray._private.worker._global_node.get_session_dir_path(), "logs", "train")
    said = [path.read_text() for path in logs.glob("ray-train-sys-controller-*.log")]
    return sum(text.count("Started training worker group") for text in said)
