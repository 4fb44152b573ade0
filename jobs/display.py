"""What a person sees: one progress display on a terminal, one line every few seconds in a log."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_POLL_SECONDS = 0.5
_LOG_SECONDS = 5.0
_LOG_WIDTH = 160


class Display:
    """Writes to stderr, so that `--json` results stay alone on stdout.

    To the stderr that the process was started with: later that descriptor leads to a log file
    while Ray runs (jobs.quiet).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        stream = os.fdopen(os.dup(2), "w", buffering=1)
        width = None if stream.isatty() else _LOG_WIDTH  # a log's lines are not wrapped
        self.console = Console(file=stream, quiet=quiet, highlight=False, emoji=False, width=width)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def done(self, text: str) -> None:
        self.console.print(Text.assemble(("✓", "green"), f" {text}"), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(Text.assemble(("!", "yellow"), f" {text}"), soft_wrap=True)

    @contextmanager
    def stage(
        self,
        title: str,
        total: int,
        unit: str,
        read: Callable[[], tuple[int, dict[str, Any]]],
        describe: Callable[[dict[str, Any]], str],
    ) -> Iterator[None]:
        """Show `read()` = (done, fields) until the block ends, as a bar or as lines.

        A field `total` takes the place of `total`, for work whose size shows only later.
        """
        if self.console.quiet:
            yield
            return

        def read_at_most() -> tuple[int, dict[str, Any]]:
            done, fields = read()  # work that is repeated after a worker died is counted again
            return min(done, fields.get("total", total)), fields

        watcher = self._bar if self.console.is_terminal else self._lines
        stop = threading.Event()
        thread = threading.Thread(
            target=watcher, args=(title, total, unit, read_at_most, describe, stop), daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _bar(
        self, title: str, total: int, unit: str, read, describe, stop: threading.Event
    ) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[extra]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total, rate="", extra="")
            rate = _Rate(unit)
            while not stop.wait(_POLL_SECONDS):
                done, fields = read()
                progress.update(
                    task,
                    completed=done,
                    total=fields.get("total", total),
                    rate=rate(done, fields),
                    extra=describe(fields),
                )

    def _lines(
        self, title: str, total: int, unit: str, read, describe, stop: threading.Event
    ) -> None:
        rate, last = _Rate(unit), -1
        while not stop.wait(_LOG_SECONDS):
            done, fields = read()
            text = rate(done, fields)
            if done != last:
                goal = fields.get("total", total)
                left = rate.seconds_left(done, goal)
                eta = "" if left is None else f", {left:.0f} s left"
                self.say(f"{title}: {done}/{goal} {text}{eta}  {describe(fields)}".rstrip())
                last = done


class _Rate:
    """Rate since the first progress, so that start-up does not count, nor what was there before
    (the field `stored`)."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._start: tuple[float, int] | None = None
        self._per_second = 0.0

    def __call__(self, done: int, fields: dict[str, Any]) -> str:
        now = time.monotonic()
        if done <= fields.get("stored", 0):
            return "starting"
        if self._start is None or done < self._start[1]:  # another count begins
            self._start = (now, done)
        elapsed = now - self._start[0]
        self._per_second = (done - self._start[1]) / elapsed if elapsed > 0 else 0.0
        return f"{self._per_second:.1f} {self._unit}/s" if self._per_second else ""

    def seconds_left(self, done: int, total: int) -> float | None:
        return (total - done) / self._per_second if self._per_second else None


def loss_fields(fields: dict[str, Any]) -> str:
    """What training shows beside its rate."""
    shown = {k: v for k, v in fields.items() if k.startswith("loss") or k in ("network", "stage")}
    return "  ".join(
        f"{key} {value:.3f}" if isinstance(value, float) else str(value)
        for key, value in shown.items()
    )
