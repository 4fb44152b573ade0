"""Names of the sample pictures of a run: `samples/step_<n>.png`."""

import re
from dataclasses import dataclass

from pipelines.storage import Store

SAMPLES = "samples"
_NAME = re.compile(r"step_(\d+)\.png")


@dataclass(frozen=True)
class SampleFile:
    """`size`: in bytes."""

    step: int
    path: str
    size: int


def sample_path(run: Store, step: int) -> str:
    return run.path(SAMPLES, f"step_{step:08d}.png")


def sample_files(run: Store) -> list[SampleFile]:
    """Those that are there, by step."""
    try:
        entries = run.fs.ls(run.path(SAMPLES), detail=True)
    except FileNotFoundError:
        return []
    found = [
        SampleFile(int(match[1]), entry["name"], entry["size"])
        for entry in entries
        if (match := _NAME.fullmatch(entry["name"].rsplit("/", 1)[-1]))
    ]
    return sorted(found, key=lambda file: file.step)
