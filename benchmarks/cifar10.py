"""CIFAR-10: is the metric right, and what did a run come to?

    python -m benchmarks.cifar10 check --real data/cifar10 --count 1000
    python -m benchmarks.cifar10 collect --run runs/cifar10-cpu --name cifar10_cpu \\
        --seconds train-teacher=7000 --seconds train=900

`check` measures training against test pictures: KID with its interval, and FID where there are
enough. With all 50,000 and 10,000 (`--count 50000`) the literature's FID is about 3.15; on a CPU
core that takes hours. `collect` puts a run's own records into `benchmarks/results/<name>.json`;
`--seconds` are the wall times of its verbs, which the run does not know.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from dmd_core.inception import DIMENSION, INCEPTION_SPACE, load_inception
from dmd_core.metrics import frechet_distance, kid
from pipelines import cifar10
from pipelines.evaluation import METRICS
from pipelines.storage import open_store

RESULTS = Path(__file__).parent / "results"
_PUBLISHED = {  # EDM's table 2, DMD's table 1: class-conditional, FID on 50,000 samples
    "edm_teacher_fid": 1.79,
    "edm_teacher_fid_as_in_dmd": 1.84,
    "dmd_student_fid": 2.66,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    check = actions.add_parser("check")
    check.add_argument("--real", default="data/cifar10")
    check.add_argument("--count", type=int, default=1000)
    check.add_argument("--inception", default="")
    check.add_argument("--device", default="cpu")
    collecting = actions.add_parser("collect")
    collecting.add_argument("--run", required=True)
    collecting.add_argument("--name", required=True)
    collecting.add_argument("--seconds", action="append", default=[])
    collecting.add_argument("--check", help="what `check` has printed, as a file")
    collecting.add_argument("--note", default="", help="how the machine was used meanwhile")
    options = parser.parse_args()
    if options.action == "check":
        print(json.dumps(measure(options), indent=1))
        return 0
    content = collect(Path(options.run), dict(pair.split("=") for pair in options.seconds))
    if options.check:
        content["train_against_test"] = json.loads(Path(options.check).read_text())
    content["hardware"]["note"] = options.note
    target = RESULTS / f"{options.name}.json"
    target.write_text(json.dumps(content, indent=1) + "\n")
    print(target)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Training against test pictures."""
    network = load_inception(options.inception, device=options.device)
    store, started = open_store(options.real), time.monotonic()
    train, test = (
        network(cifar10.load_split(store, split, options.count).pictures)
        for split in ("train", "test")
    )
    least = min(len(train), len(test))
    rows = slice(min(least, 5000))
    return {
        "features": INCEPTION_SPACE,
        "train": len(train),
        "test": len(test),
        "kid": vars(kid(train[rows], test[rows])),
        "fid": frechet_distance(train, test) if least >= 4 * DIMENSION else None,
        "seconds": round(time.monotonic() - started),
        "device": options.device,
    }


def collect(run: Path, seconds: dict[str, str]) -> dict[str, Any]:
    """A run's metrics with what they were made with; `seconds`: verb → wall time."""
    metrics = json.loads((run / METRICS).read_text())
    losses = [json.loads(line) for line in (run / "teacher_metrics.jsonl").read_text().splitlines()]
    tail = [entry["loss_unet"] for entry in losses[-5:]]
    return metrics | {
        "published": _PUBLISHED,
        "teacher_training": {
            "steps": losses[-1]["step"],
            "loss_first": losses[0]["loss_unet"],
            "loss_last": float(np.mean(tail)),
        },
        "seconds": {verb: float(value) for verb, value in seconds.items()},
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
        },
        "validation": {
            path.stem: json.loads(path.read_text())["metrics"]
            for path in sorted(run.glob("validation/step_*.json"))
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
