"""`dmd demo`: the whole journey on the shipped teacher, on this machine.

Each station is the verb of its own; what is finished is skipped, so a killed demo goes on when it
is started again.
"""

import os
import sys
import time
from typing import Any

from jobs import evaluate, export, pairs, report, train
from jobs.session import Session

STATIONS = (pairs, train, export, evaluate, report)


def run(session: Session) -> dict[str, Any]:
    """Pairs, train, export, evaluate, report; returns where the results lie."""
    started = time.monotonic()
    results = {station.__name__.rsplit(".", 1)[-1]: station.run(session) for station in STATIONS}
    student, page = (
        _short(path) for path in (results["export"]["student"], results["report"]["report"])
    )
    session.display.say(
        f"\nfinished in {time.monotonic() - started:.0f} s\n"
        f"  report   {page}\n"
        f"  student  {student}\n\n"
        "Make a picture with it (plain diffusers):\n"
        f"  {picture_command(student, results['export']['num_inference_steps'])}\n"
    )
    return {"student": student, "report": page}


def plan(session: Session) -> dict[str, Any]:
    """The plans of all stations."""
    return {station.__name__.rsplit(".", 1)[-1]: station.plan(session) for station in STATIONS}


def picture_command(student: str, steps: int = 1) -> str:
    return (
        f'{_short(sys.executable)} -c "from diffusers import DiffusionPipeline; '
        f"DiffusionPipeline.from_pretrained('{student}')"
        f"('woman and man holding hands', num_inference_steps={steps}, guidance_scale=0)"
        ".images[0].save('hands.png')\""
    )


def _short(path: str) -> str:
    """A path below the current folder as people would type it; any other unchanged."""
    if path.startswith(os.getcwd() + os.sep):
        return os.path.relpath(path)
    return path


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("demo"))
