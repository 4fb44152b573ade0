"""CIFAR-10: is the metric right, and what did a run come to?

    python -m benchmarks.cifar10 check --real data/cifar10 --count 1000
    python -m benchmarks.cifar10 collect --run runs/cifar10-cpu --name cifar10_cpu \\
        --seconds train-teacher=7000 --seconds train=900

`check` measures training against test pictures: KID with its interval, and FID where there are
enough. With all 50,000 and 10,000 (`--count 50000`) the literature's FID is about 3.15; on two CPU
cores that takes two hours. With 20,000 and all test pictures it takes 40 minutes, and says what FID
would be with 50,000.

`collect` puts a run's own records into `benchmarks/results/<name>.json`; `--seconds` are the wall
times of its verbs, which the run does not know.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray

from dmd_core.inception import INCEPTION_SPACE, weights_file
from dmd_core.metrics import enough_for_frechet, frechet_distance, kid
from pipelines import cifar10
from pipelines.evaluation import METRICS
from pipelines.feature_parts import counted, inception_features
from pipelines.images import SamplerPool
from pipelines.measures import KID_ROWS
from pipelines.storage import Store, open_store
from pipelines.systems import Images

RESULTS = Path(__file__).parent / "results"
_TRAINING_SET = 50_000
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
    check.add_argument("--actors", type=int, default=os.cpu_count(), help="workers, a core each")
    check.add_argument("--gpus", type=float, default=0, help="GPUs that they share")
    collecting = actions.add_parser("collect")
    collecting.add_argument("--run", required=True)
    collecting.add_argument("--teacher-run", default="", help="where its teacher was trained")
    collecting.add_argument("--name", required=True)
    collecting.add_argument("--seconds", action="append", default=[])
    collecting.add_argument("--check", help="what `check` has printed, as a file")
    collecting.add_argument("--note", default="", help="how the machine was used meanwhile")
    options = parser.parse_args()
    if options.action == "check":
        print(json.dumps(measure(options), indent=1))
        return 0
    seconds = dict(pair.split("=") for pair in options.seconds)
    content = collect(Path(options.run), Path(options.teacher_run or options.run), seconds)
    if options.check:
        content["train_against_test"] = json.loads(Path(options.check).read_text())
    content["hardware"]["note"] = options.note
    target = RESULTS / f"{options.name}.json"
    target.write_text(json.dumps(content, indent=1) + "\n")
    print(target)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Training against test pictures. Features are kept with the data set: stopped or killed, the
    same command goes on."""
    weights, store = str(weights_file(options.inception)), open_store(options.real)
    with ray.init(address="local", include_dashboard=False, log_to_driver=False):
        train, test = (_features(options, weights, store, split) for split in ("train", "test"))
    rows = slice(min(len(train), len(test), KID_ROWS))
    enough = enough_for_frechet(train) and enough_for_frechet(test)
    fid = frechet_distance(train, test) if enough else None
    return {
        "features": INCEPTION_SPACE,
        "train": len(train),
        "test": len(test),
        "kid": vars(kid(train[rows], test[rows])),
        "fid": fid,
        "fid_of_all": None if fid is None else fid_of_all(train, test, fid),
        "device": "cuda" if options.gpus else "cpu",
    }


def fid_of_all(train: np.ndarray, test: np.ndarray, fid: float) -> dict[str, float] | None:
    """What `fid`, that of `train` to `test`, comes to with as many pictures as the whole training
    set has: to first order its bias is a line in 1/N (Chong and Forsyth, arXiv 1911.07023), here
    through N and N/2, the mean of both halves. None: half of `train` are too few."""
    whole, half = len(train), len(train) // 2
    if not enough_for_frechet(train[:half]):
        return None
    of_half = (frechet_distance(train[:half], test) + frechet_distance(train[half:], test)) / 2
    slope = (of_half - fid) / (1 / half - 1 / whole)
    return {
        str(half): of_half,
        str(whole): fid,
        f"extrapolated to {_TRAINING_SET}": fid + slope * (1 / _TRAINING_SET - 1 / whole),
    }


def _features(options: argparse.Namespace, weights: str, store: Store, split: str) -> np.ndarray:
    data = cifar10.load_split(store, split, options.count)
    count = len(data.labels)
    nothing = np.empty((count, 0), np.float32)
    prompts = tuple(cifar10.CLASSES[label] for label in data.labels)
    pictures = Images(prompts, tuple(range(count)), nothing, data.pictures, nothing)

    def show(done: int, total: int) -> None:
        print(f"{split}: {done} of {total} pictures", file=sys.stderr, flush=True)

    return inception_features(
        weights,
        pictures,
        SamplerPool(options.actors, cpus=1, gpus=options.gpus / max(1, options.actors)),
        store=store,
        folder=f"inception/{split}-{cifar10.dataset_digest(store)[:16]}.inception",
        on_rows=counted(count, show),
    )


def collect(run: Path, teacher_run: Path, seconds: dict[str, str]) -> dict[str, Any]:
    """A run's metrics with what they were made with; `seconds`: verb → wall time."""
    metrics = json.loads((run / METRICS).read_text())
    lines = (teacher_run / "teacher_metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines]
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
            "versions": json.loads((run / "versions.json").read_text()),
        },
        "validation": {
            path.stem: json.loads(path.read_text())["metrics"]
            for path in sorted(run.glob("validation/step_*.json"))
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
