"""What the log lines of a training say about its speed. A window: the steps between two lines."""

from collections.abc import Sequence

import numpy as np


def rate_after(windows: Sequence[tuple[int, float]], warm_up: int, batch: int) -> float:
    """Samples/s after step `warm_up`, from the (last step, samples/s) of each logged window."""
    samples, seconds, before = 0, 0.0, 0
    for step, rate in windows:
        if before >= warm_up:
            samples += (step - before) * batch
            seconds += (step - before) * batch / rate
        before = step
    if not samples:
        raise ValueError(f"no window after step {warm_up}; the last one ends at step {before}")
    return samples / seconds


def seconds_per_save(windows: Sequence[float], every: int) -> list[float]:
    """What each save cost, from the seconds of equally long windows; one is due after every
    `every` of them, an even number.

    A save goes on beside the steps that follow it. So the half of the windows after it is compared
    with the half that remains until the next, and with the one before it: the mean of the two, so
    that a machine that slows down is not taken for a save.
    """
    half = every // 2
    halves = np.add.reduceat(windows, range(0, len(windows) // half * half, half))
    return [
        float(halves[n] - (halves[n - 1] + halves[n + 1]) / 2) for n in range(2, len(halves) - 1, 2)
    ]
