"""How much faster is one step? Teacher and student take turns, one picture at a time.

    python -m benchmarks.one_step --config demo --repeats 50

Needs a run with an exported student. Prints a table and writes `benchmarks/results/one_step.json`.
A ratio of two things in one run on one machine; single times mean little elsewhere.
"""

import argparse
import importlib.metadata
import json
import os
from pathlib import Path

from benchmarks.machine import processor
from jobs.config import resolve_shipped
from jobs.errors import JobError
from jobs.export import EXPORTED, check_student
from jobs.session import open_session
from pipelines.prompts import read_prompts
from pipelines.systems import Networks, SamplingPlan
from pipelines.timing import measure_speed

RESULTS = Path(__file__).parent / "results" / "one_step.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="demo")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    with open_session(options.config, options.set) as session:
        exported = session.read_json(EXPORTED)
        if exported is None:
            raise JobError(f"{session.store.url} has no student; run `dmd demo` first")
        folder, recipe = check_student(session, exported), session.recipe
        timing = measure_speed(
            SamplingPlan.from_sections(
                recipe.evaluate, recipe.pairs, recipe.train.student_timesteps
            ),
            Networks(session.teacher_url, folder, recipe.storage),
            read_prompts(resolve_shipped(recipe.evaluate.prompts), recipe.storage).prompts,
            options.repeats,
        )
    print(f"{'system':12} {'median s':>10} {'min s':>10} {'max s':>10} {'× student':>10}")
    student = timing["seconds_per_picture"]["student"]["median"]
    for system, seconds in timing["seconds_per_picture"].items():
        ratio = seconds["median"] / student
        print(
            f"{system:12} {seconds['median']:10.4f} {seconds['min']:10.4f} "
            f"{seconds['max']:10.4f} {ratio:10.1f}"
        )
    result = {
        "timing": timing,
        "teacher_steps": recipe.evaluate.teacher_steps or recipe.pairs.steps,
        "hardware": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "diffusers", "transformers")
        },
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {RESULTS}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
