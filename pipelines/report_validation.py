"""Station 10: what was measured while the student trained, as curves with confidence intervals."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.beside_results import BEST
from pipelines.beside_results import FOLDER as VALIDATION
from pipelines.plots import interval_curve
from pipelines.storage import Store

_NAME = re.compile(r"step_(\d+)\.json")
_LABELS = {
    "kid": "kernel distance to the reference (KID), lower is nearer",
    "fid": "Fréchet distance to real pictures (FID), lower is nearer",
    "rmse": "RMSE to the teacher's pictures, lower is nearer",
    "retrieval": "retrieval, top 1: share of right pictures, higher is better",
}


@dataclass(frozen=True)
class Validation:
    """`results`: step → metric → value and mostly low and high, all finite, ascending. `best`: of
    best.json. `failed`: step → why, ascending; "" where that is not known."""

    results: Mapping[int, Mapping[str, Mapping[str, float]]]
    best: Mapping[str, Any] | None = None
    failed: Mapping[int, str] = field(default_factory=dict)


NO_VALIDATION = Validation({})


def read_validation(run: Store) -> Validation:
    """The results that were measured like the newest one; others would not be one curve."""
    folder = run.path(VALIDATION)
    paths = run.fs.ls(folder, detail=False) if run.fs.exists(folder) else []
    found = {
        int(match[1]): json.loads(run.fs.cat_file(path))
        for path in sorted(paths)
        if (match := _NAME.fullmatch(path.rsplit("/", 1)[-1]))
    }
    measured = {step: content for step, content in found.items() if content.get("metrics")}
    inputs = _inputs(measured[max(measured)]) if measured else None
    path = run.path(BEST)
    return Validation(
        results={
            step: {name: entry for name, entry in content["metrics"].items() if _drawable(entry)}
            for step, content in sorted(measured.items())
            if _inputs(content) == inputs
        },
        best=json.loads(run.fs.cat_file(path)) if run.fs.exists(path) else None,
        failed={
            step: str(content.get("error") or "")
            for step, content in sorted(found.items())
            if step not in measured
        },
    )


def validation_curves(validation: Validation, marks: Sequence[int]) -> dict[str, str]:
    """Metric → its curve as an SVG element; `marks` as in `interval_curve`."""
    curves = {}
    for name in dict.fromkeys(name for entries in validation.results.values() for name in entries):
        points = {s: entries[name] for s, entries in validation.results.items() if name in entries}
        best = validation.best
        curves[_LABELS.get(name, name)] = interval_curve(
            list(points),
            # FID has no interval.
            *(
                [point.get(key, point["value"]) for point in points.values()]
                for key in ("value", "low", "high")
            ),
            label=_LABELS.get(name, name),
            best=best["step"] if best and best["metric"] == name else None,
            marks=marks,
        )
    return curves


def best_sentence(validation: Validation) -> str:
    """What best.json says; empty without one."""
    best = validation.best
    if best is None:
        return ""
    metric = {"kid": "KID", "rmse": "RMSE"}.get(best["metric"], best["metric"])
    return f"Best by {metric}: step {best['step']}, with {best['value']:.3g}."


def failed_sentence(validation: Validation) -> str:
    """Which evaluations failed, and why the last of them did; empty without any."""
    if not validation.failed:
        return ""
    *_, (last, why) = validation.failed.items()
    steps = ", ".join(map(str, validation.failed))
    several = len(validation.failed) > 1
    of = f"evaluations of steps {steps}" if several else f"evaluation of step {last}"
    reason = f"{', the last one' * several}: {why.rstrip('.')}" if why else ""
    return f"The {of} failed{reason}."


def _inputs(content: Mapping[str, Any]) -> Any:
    return (content.get("provenance") or {}).get("inputs")


def _drawable(entry: Mapping[str, Any] | None) -> bool:
    """Is there a value, and is everything there finite?"""
    found = [entry[key] for key in ("value", "low", "high") if key in entry] if entry else []
    return (
        bool(found)
        and "value" in (entry or {})
        and all(isinstance(number, int | float) and math.isfinite(number) for number in found)
    )
