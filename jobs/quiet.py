"""Ray's noise, out of sight: a log file instead of the terminal."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def redirected_output(path: str) -> Iterator[None]:
    """Send stdout and stderr of this process, C++ included, to the file until the block ends.

    Ray's core writes to the descriptors directly, so replacing `sys.stderr` would not do.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    _flush()
    saved = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        _flush()
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        os.close(log)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
