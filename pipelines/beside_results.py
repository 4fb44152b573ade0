"""Results of the evaluations beside a training: `<run>/validation/step_<n>.json`, `best.json`.

The files are the truth: which checkpoint is the best, which still wait, and whether to stop are
functions of them, so that a run that was killed goes on with the same answers.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dmd_core.files import write_atomic
from pipelines.beside_settings import EvaluationMetric, EvaluationSection
from pipelines.storage import Store

FOLDER, BEST = "validation", "best.json"
_NAME = re.compile(r"step_(\d+)\.json")
_SIGN = {"kid": 1.0, "rmse": 1.0, "retrieval": -1.0}  # less of sign · value is better


@dataclass(frozen=True)
class Evaluated:
    """What came of one evaluation. `metrics`: name → value, low, high; None: not measured here.
    `error`: why there are none."""

    step: int
    metrics: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    def value(self, metric: str) -> float | None:
        entry = self.metrics.get(metric)
        found = None if entry is None else entry["value"]
        return found if found is not None and math.isfinite(found) else None

    def values(self) -> dict[str, float]:
        """Every metric that has a finite value, as a plain number."""
        found = {name: self.value(name) for name in self.metrics}
        return {name: value for name, value in found.items() if value is not None}


# ---------------------------------------------------------------------- decisions


def ranked(results: Iterable[Evaluated], metric: EvaluationMetric) -> list[int]:
    """Steps that have a value, the best first; of equal ones the earlier."""
    valued = [(found.value(metric), found.step) for found in results]
    keys = [(_SIGN[metric] * value, step) for value, step in valued if value is not None]
    return [step for _, step in sorted(keys)]


def best(results: Iterable[Evaluated], metric: EvaluationMetric) -> int | None:
    """The step of the best value; None: no evaluation gave one."""
    steps = ranked(results, metric)
    return steps[0] if steps else None


def without_gain(results: Iterable[Evaluated], metric: EvaluationMetric) -> int:
    """How many evaluations came after the best one: what `patience` counts.

    By the plain value: with confidence intervals in its place, many small gains would count as
    none. An evaluation that failed says nothing; one without a finite value is no gain.
    """
    results = [found for found in results if not found.error]
    step = best(results, metric)
    return sum(step is None or found.step > step for found in results)


def kept_steps(
    results: Iterable[Evaluated], waiting: Collection[int], section: EvaluationSection
) -> list[int]:
    """Steps whose checkpoints must stay: the best ones, and those that wait to be evaluated.

    Of more waiting ones than `waiting_checkpoints_limit`: the oldest, which may be under way, and
    the newest.
    """
    queue = sorted(waiting)
    newest = queue[1:][max(0, len(queue) - section.waiting_checkpoints_limit) :]
    top = ranked(results, section.metric)[: section.best_checkpoints_limit]
    return sorted({*top, *queue[:1], *newest})


def waiting_steps(
    committed: Sequence[int],
    results: Iterable[Evaluated],
    section: EvaluationSection,
    *,
    finished: bool = False,
) -> list[int]:
    """Committed checkpoints that are to be evaluated and have no result. `finished`: the newest
    one ends the run, and is evaluated whatever its step. Step 0 is no student yet."""
    if not section.steps:
        return []
    out = {0, *(found.step for found in results)}
    last = set(committed[-1:]) if finished else set()
    return [s for s in committed if (s % section.steps == 0 or s in last) and s not in out]


# ---------------------------------------------------------------------- files


def result_path(store: Store, step: int) -> str:
    return store.path(FOLDER, f"step_{step:08d}.json")


def write_result(store: Store, result: Evaluated) -> None:
    content: dict[str, Any] = {
        "step": result.step,
        "metrics": {name: _finite(entry) for name, entry in result.metrics.items()} or None,
        "provenance": dict(result.provenance),
    }
    if result.error:
        content["error"] = result.error
    data = json.dumps(content, indent=2, allow_nan=False).encode()
    write_atomic(store.fs, result_path(store, result.step), data)


def read_results(store: Store, inputs: str, known: Iterable[Evaluated] = ()) -> list[Evaluated]:
    """Every result that was measured with the same `inputs` (prompts, teacher, way of sampling),
    by step. A file that cannot be read is none: that checkpoint is evaluated again. `known`: need
    not be read again."""
    before = {found.step: found for found in known}
    found = [before.get(step) or _read(store, path) for step, path in _files(store)]
    return [one for one in found if one is not None and one.provenance.get("inputs") == inputs]


def pending_evaluations(
    store: Store,
    committed: Sequence[int],
    section: EvaluationSection,
    inputs: str,
    *,
    finished: bool = False,
) -> list[int]:
    """Checkpoints of `committed` that wait to be evaluated, oldest first; see `waiting_steps`."""
    if not section.steps:
        return []
    results = read_results(store, inputs)
    return waiting_steps(committed, results, section, finished=finished)


def drop_results_after(store: Store, step: int) -> None:
    """Forget results of checkpoints that were lost: their steps are trained again."""
    for found, path in _files(store):
        if found > step:
            store.fs.rm_file(path)


def update_best(store: Store, section: EvaluationSection, inputs: str) -> dict[str, Any] | None:
    """Bring `best.json` up to date; returns its content. None: no result has a value, no file."""
    results = {found.step: found for found in read_results(store, inputs)}
    step, path = best(results.values(), section.metric), store.path(BEST)
    there = store.fs.exists(path)
    if step is None:
        if there:
            store.fs.rm_file(path)
        return None
    content = {
        "step": step,
        "metric": section.metric,
        "value": results[step].value(section.metric),
        "file": result_path(store, step).removeprefix(f"{store.root}/"),
    }
    data = json.dumps(content, indent=2).encode()
    if not there or store.fs.cat_file(path) != data:
        write_atomic(store.fs, path, data)
    return content


def _files(store: Store) -> list[tuple[int, str]]:
    """(step, path) of every result, by step."""
    folder = store.path(FOLDER)
    store.fs.invalidate_cache()
    if not store.fs.exists(folder):
        return []
    names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in store.fs.ls(folder, detail=False)]
    matches = [match for name in names if (match := _NAME.fullmatch(name))]
    return sorted((int(match[1]), store.path(FOLDER, match[0])) for match in matches)


def _read(store: Store, path: str) -> Evaluated | None:
    try:
        content = json.loads(store.fs.cat_file(path))
        return Evaluated(
            int(content["step"]),
            dict(content["metrics"] or {}),
            dict(content["provenance"]),
            str(content.get("error", "")),
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _finite(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """JSON has no word for a number that is not finite but null."""
    if entry is None:
        return None
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
    }
