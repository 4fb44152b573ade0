"""The machine and the libraries that a benchmark ran on, for its results."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path


def processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Of each library, and of Python."""
    found = {name: importlib.metadata.version(name) for name in libraries}
    return found | {"python": platform.python_version()}
