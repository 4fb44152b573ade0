"""Recipes, data and comparisons for runs of `gloo_runs`: two runs are to be one and the same."""

import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from dmd_core.checkpoint import Checkpoint, Tensors, committed_steps, load_checkpoint
from dmd_core.teacher import load_teacher, teacher_revision
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import Store, open_store
from tests.pipelines import gloo_runs
from tests.pipelines.dmd_runs import PROMPTS, seal_pairs, write_pictures
from tests.pipelines.gloo_runs import PAIRS, Death, Order, Outcome

ROWS = (7, 5)  # of the pairs' first version, and of what the second one adds
STEPS = 7

# 4 pairs a step: the first version's epoch ends in step 2, where the run goes over to the second,
# whose first epoch is steps 3 to 5.
DMD = {
    "follow_pairs": "epoch",
    "micro_batch_size": 2,
    "stages": [
        {"steps": 2, "pairs_in_dm": True},
        {"steps": 3, "fake_updates": 2, "learning_rate": 2e-4},
        {"steps": 2},
    ],
}
# A head that is not trained in the first stage, and one fake update more with it.
DMD2 = {
    "micro_batch_size": 3,
    "ema_halflife_samples": 20.0,
    "stages": [
        {"steps": 2},
        {"steps": 5, "lambda_reg": 0.0, "gan_weight": 0.1, "r1_weight": 0.1, "fake_updates": 2},
    ],
}
RECIPES = {"dmd": DMD, "dmd2": DMD2}
FULL = {"generator", "fake", "generator_optimizer", "fake_optimizer"}
PARTS = {"dmd": FULL, "dmd2": FULL | {"head", "head_optimizer", "ema"}}


@dataclass(frozen=True)
class Run:
    """A run's folder after a start of it."""

    store: Store
    outcome: Outcome

    @property
    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl, without what a clock says."""
        raw = self.store.fs.cat_file(self.store.path("metrics.jsonl")).splitlines()
        clock = ("samples_per_second", "data_wait")
        return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in raw]

    @property
    def committed(self) -> list[int]:
        return committed_steps(self.store.fs, self.store.path(CHECKPOINTS))

    def checkpoint(self, step: int | None = None) -> Checkpoint:
        found = load_checkpoint(self.store.fs, self.store.path(CHECKPOINTS), step)
        assert found is not None
        return found


class Nursery:
    """Starts workers for `run`; `close` ends the helper process."""

    def __init__(self, scratch: Path) -> None:
        self._scratch, self._orders = scratch, 0
        scratch.mkdir(parents=True, exist_ok=True)
        self._log = open(scratch / "log", "w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", gloo_runs.__name__],
            cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True,
        )  # fmt: skip

    def run(self, order: Order) -> Outcome:
        self._orders += 1
        out = self._scratch / str(self._orders)
        out.mkdir()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([asdict(order), str(out)]) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        logs = [path.read_text() for path in sorted(out.glob("log-*"))]
        seen = [_read_seen(out / f"seen-{rank}") for rank in range(order.size)]
        return Outcome(
            codes, "\n".join(logs), seen, _read_live(out / "begun"), _read_live(out / "live")
        )

    def finish(self, order: Order) -> Outcome:
        """A start that is to reach the end of the run."""
        outcome = self.run(order)
        assert outcome.codes == [0] * order.size, outcome.said[-4000:]
        return outcome

    def close(self) -> None:
        self._process.communicate(timeout=60)
        self._log.close()


def _read_seen(path: Path) -> dict[int, dict[str, list[str]]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {step: streams for step, streams in map(json.loads, lines)}


def _read_live(path: Path) -> dict[str, Tensors]:
    live: dict[str, Tensors] = {}
    found = safetensors.torch.load_file(path) if path.exists() else {}
    for key, value in found.items():
        part, name = key.split("/", 1)
        live.setdefault(part, {})[name] = value
    return live


class Bench:
    """Starts runs on one data set of two sealed versions and one folder of real pictures."""

    def __init__(self, teacher: str, scratch: Path) -> None:
        self._teacher, self._scratch, self._numbers = teacher, scratch, itertools.count()
        self._nursery = Nursery(scratch / "starts")
        root = open_store(str(scratch / "pairs"))
        shape, revision = load_teacher(teacher).latent_shape(), teacher_revision(teacher)
        ids = range(1, sum(ROWS) + 1)
        seal_pairs(root, PAIRS, revision, shape, ids[: ROWS[0]])
        seal_pairs(root, PAIRS, revision, shape, ids[ROWS[0] :], base="b")
        self._root, self._pictures = root.url, write_pictures(scratch / "pictures", PROMPTS[:3])
        self._straight: dict[str, Run] = {}

    def store(self) -> Store:
        """Of a new run."""
        return open_store(str(self._scratch / f"run-{next(self._numbers)}"))

    def start(
        self, recipe: Mapping[str, Any], size: int, store: Store, death: Death | None = None
    ) -> Run:
        """The command of a run on `size` workers; without a `death` it must end well."""
        train = {"real_pictures": self._pictures, **recipe}
        order = Order(store.url, self._teacher, self._root, train, size, death)
        return Run(store, (self._nursery.run if death else self._nursery.finish)(order))

    def attempt(self, recipe: Mapping[str, Any], size: int, store: Store) -> Outcome:
        """A start that need not end well."""
        train = {"real_pictures": self._pictures, **recipe}
        return self._nursery.run(Order(store.url, self._teacher, self._root, train, size))

    def straight(self, recipe: Mapping[str, Any], size: int = 1) -> Run:
        """The undisturbed run, made once."""
        key = json.dumps([recipe, size])
        if key not in self._straight:
            self._straight[key] = self.start(recipe, size, self.store())
        return self._straight[key]


@cache
def shared_bench(teacher: str) -> Bench:
    """One for all tests: its helper process takes seconds to start, and runs are made once."""
    return Bench(teacher, Path(teacher).parent / "bench")


# ------------------------------------------------------------------ comparing


def same_tensors(found: Mapping[str, Tensors], expected: Mapping[str, Tensors]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for part, tensors in expected.items():
        assert found[part].keys() == tensors.keys()
        odd = [name for name, value in tensors.items() if not torch.equal(value, found[part][name])]
        assert not odd, f"{part}: {odd[:5]}"


def close_tensors(
    found: Mapping[str, Tensors],
    expected: Mapping[str, Tensors],
    start: Mapping[str, Tensors],
    tolerance: float,
    way: float | None = None,
) -> None:
    """Weights to `way` (as `tolerance`) of the way that they went from `start`; the rest to
    `tolerance` of its own size."""
    assert found.keys() == expected.keys()
    for part, tensors in expected.items():
        assert found[part].keys() == tensors.keys()
        kinds = ("exp_avg", "exp_avg_sq", "step") if part.endswith("_optimizer") else ("",)
        for kind in kinds:
            names = [name for name in tensors if name.endswith(f".{kind}") or not kind]
            away = _norm(found[part][n].double() - tensors[n] for n in names)
            origin = start.get("generator" if part == "ema" else part, {}) if not kind else {}
            size = _norm(tensors[n].double() - origin.get(n, 0.0) for n in names)
            most = tolerance if kind or way is None else way
            assert away <= most * size, f"{part} {kind}: {away / size:.1e} of its size"


def _norm(tensors: Any) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors) ** 0.5


def close_lines(
    found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float
) -> None:
    """Losses and norms of every step."""
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            away = abs(ours[name] - value)
            assert away <= tolerance * max(abs(value), 1e-2), (
                f"step {theirs['step']}: {name} is {ours[name]}, expected {value}"
            )
