"""Does distribution matching help beside the regression on pairs? Two evaluated runs, compared.

    dmd demo --config few-pairs
    dmd demo --config few-pairs --set run.dir=runs/regression --set train.dm_weight=0
    python -m benchmarks.two_losses --both runs/few-pairs --regression runs/regression

Both students are measured against the same draw of the teacher. Writes
`benchmarks/results/two_losses_cpu.json`: the metrics of both runs, and the paired difference of
their students' KID, negative where the first is nearer.
"""

import argparse
import importlib.metadata
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.machine import processor
from dmd_core.metrics import kid_difference
from jobs.run_settings import flat_settings
from pipelines.evaluation import METRICS
from pipelines.measures import KID_ROWS, reference_of, verdict
from pipelines.storage import open_store
from pipelines.stored_images import StoredImages, array_of, open_images
from pipelines.systems import STUDENT
from pipelines.unit import Unit

RESULTS = Path(__file__).parent / "results" / "two_losses_cpu.json"
_OF_BOTH = ("systems", "comparisons", "timing")
_TRAINED = ("train", "pairs")
_PLACES = ("pairs.root", "pairs.prompts")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--both", required=True, help="run with both losses")
    parser.add_argument("--regression", required=True, help="the same with train.dm_weight 0")
    parser.add_argument("--out", default=str(RESULTS))
    options = parser.parse_args()
    content = compare(Path(options.both), Path(options.regression))
    Path(options.out).write_text(json.dumps(content, indent=1) + "\n")
    found = content["student_kid_difference"]
    print(
        f"{options.out}: both − regression alone {found['value']:.4f} "
        f"({found['low']:.4f} to {found['high']:.4f}), nearer: {content['both_is_nearer']}"
    )
    return 0


def compare(both: Path, regression: Path) -> dict[str, Any]:
    """The content of the result. Raises ValueError for runs that differ in more than the loss."""
    runs = {"both": both, "regression": regression}
    metrics = {name: json.loads((run / METRICS).read_text()) for name, run in runs.items()}
    settings = {name: _settings(run) for name, run in runs.items()}
    changed = sorted(
        key for key in settings["both"] if settings["both"][key] != settings["regression"][key]
    )
    if changed != ["train.dm_weight"]:
        raise ValueError(f"the runs differ in {changed}; expected train.dm_weight alone")
    images = {name: _pictures(run, metrics[name]) for name, run in runs.items()}
    against = reference_of(images["both"])
    prompts = images["both"][STUDENT].prompts[:KID_ROWS]
    difference = kid_difference(
        *(_features(images[name][STUDENT]) for name in runs),
        _features(images["both"][against]),
        **Unit(metrics["both"]["confidence"]).of(prompts),
    )
    return {
        "settings": {key: v for key, v in settings["both"].items() if key not in _PLACES},
        "prompts": metrics["both"]["prompts"],
        "samples": metrics["both"]["samples"],
        "reference": against,
        "student_kid_difference": asdict(difference),
        "both_is_nearer": verdict(difference),
        **{name: {key: metrics[name][key] for key in _OF_BOTH} for name in runs},
        "hardware": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "diffusers", "ray")
        },
    }


def _settings(run: Path) -> dict[str, Any]:
    content = yaml.safe_load((run / "config.yaml").read_text())
    return flat_settings({part: content[part] for part in _TRAINED})


def _features(images: StoredImages) -> np.ndarray:
    return array_of(images, "features", stop=KID_ROWS)


def _pictures(run: Path, metrics: dict[str, Any]) -> dict[str, StoredImages]:
    store = open_store(str(run))
    return {name: open_images(store, folder) for name, folder in metrics["pictures"].items()}


if __name__ == "__main__":
    raise SystemExit(main())
