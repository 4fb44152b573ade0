"""The machinery of `benchmarks.pairs`: measured processes, steady rates, ratios of rounds."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

# Ray's workers run at nice 15, plain processes at 0: what else a machine does would slow one side.
_EQUAL = {"RAY_worker_niceness": "0"}
# As few as show that everything runs: the numbers mean nothing.
_QUICK = (
    "steps=2", "batch_size=8", "rows_per_block=16", "row_group_rows=16", "threads_per_actor=1",
)  # fmt: skip
_WORDS = (
    ("red", "blue", "golden", "tiny", "giant", "smiling", "sleepy", "wooden"),
    ("fox", "whale", "astronaut", "teapot", "lighthouse", "bicycle", "dragon", "violin"),
    ("in the rain", "on the moon", "at sunset", "under water", "in a forest", "by the sea"),
)


@dataclass(frozen=True)
class Size:
    """How much work: `seconds` for a contender of a comparison, `rows` for a large data set."""

    seconds: float
    repeats: int
    rows: int
    reading_rows: tuple[int, int]  # with the teacher's latents, with Stable Diffusion's
    reading_s: float


FULL = Size(75, 3, 1_000_000, (131_072, 8_192), 20)
QUICK = Size(2, 1, 20_000, (2_048, 256), 1)


@dataclass(frozen=True)
class Result:
    """`measured` against `reference` (None: only `target` itself). `higher` is better, or lower.

    `ratio` is the median of the rounds' ratios, `spread` the lowest and highest of them; without a
    reference, of the measured values.
    """

    what: str
    measured: float
    reference: float | None
    unit: str
    target: float
    higher: bool
    spread: tuple[float, float]
    ratio: float | None = None
    rounds: list[Any] = field(default_factory=list)

    @property
    def met(self) -> bool:
        value = self.measured if self.ratio is None else self.ratio
        return value >= self.target if self.higher else value <= self.target


def steady_rate(stamps: Sequence[Sequence[float]], *, until_first_ends: bool = False) -> float:
    """Rows/s from when every worker has finished its first batch until the last batch of all, or
    until the first worker has nothing more to do. `stamps`: (worker, seconds, rows) per batch.

    A batch that was under way at either end counts by the share of its time.
    """
    workers: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for worker, at, rows in sorted(stamps, key=lambda stamp: stamp[1]):
        workers[worker].append((at, rows))
    if not workers:
        raise ValueError("no batches; expected at least two of each worker")
    begin = max(batches[0][0] for batches in workers.values())
    end = (min if until_first_ends else max)(batches[-1][0] for batches in workers.values())
    if end <= begin:
        raise ValueError(f"{len(stamps)} batches of {len(workers)} workers; expected more of each")
    done = 0.0
    for batches in workers.values():
        for (start, _), (stop, rows) in pairwise(batches):
            done += rows * max(0.0, min(stop, end) - max(start, begin)) / (stop - start)
    return done / (end - begin)


class Bench:
    """Starts the measured processes; their files lie in `workdir`, a folder each."""

    def __init__(self, options: argparse.Namespace, workdir: Path) -> None:
        self.size = QUICK if options.quick else FULL
        if options.repeats:
            self.size = replace(self.size, repeats=options.repeats)
        self.workdir, self.config = workdir, options.config
        quick = [f"pairs.{setting}" for setting in _QUICK] if options.quick else []
        self.common = quick + options.set
        self._count, self._log = 0, workdir / "stderr.log"
        self.about = self.run("about", self.overrides("about", "unused"))
        self.gpus = 1 if self.about["cuda"] else 0

    def folder(self, name: str) -> Path:
        """A new folder."""
        self._count += 1
        path = self.workdir / f"{self._count:03d}-{name}"
        path.mkdir()
        return path

    def overrides(self, folder: Path | str, prompts: Path | str, **pairs: Any) -> list[str]:
        settings = {"samples_per_prompt": 1, **pairs}
        own = [f"pairs.{name}={value}" for name, value in settings.items()]
        return [*self.common, f"run.dir={folder}", f"pairs.prompts={prompts}", *own]

    def start(self, work: str, overrides: list[str], **settings: Any) -> subprocess.Popen:
        content = {"config": self.config, "overrides": overrides, **settings}
        command = [sys.executable, "-m", "benchmarks.pair_loops", work, json.dumps(content)]
        with open(self._log, "ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | _EQUAL,
            )

    def finish(self, process: subprocess.Popen) -> dict[str, Any]:
        """The result of a process that was started."""
        output, _ = process.communicate()
        lines = [line for line in output.splitlines() if line.startswith("result ")]
        if process.returncode or not lines:
            log = self._log.read_text(errors="replace")[-4000:]
            raise SystemExit(f"{process.args} ended with code {process.returncode}:\n{log}")
        return json.loads(lines[-1].removeprefix("result "))

    def run(self, work: str, overrides: list[str], **settings: Any) -> dict[str, Any]:
        return self.finish(self.start(work, overrides, **settings))

    # ------------------------------------------------------------ pairs per second

    def rows_for(self, seconds: float, workers: int, **pairs: Any) -> int:
        """How many rows the loop by hand makes in so many seconds: whole blocks, as many for each
        worker."""
        size, block = self.about["batch_size"], self.about["rows_per_block"]
        rows = 2 * max(block, 2 * size)
        rate = workers * self.timed("hand_written", rows, **pairs)["rate"]
        whole = workers * block
        return max(4, round(rate * seconds / whole) + 1) * whole

    def timed(self, work: str, rows: int, *, batch_size: int | None = None, **pairs: Any):
        """Steady rate, and what lies before and after the batches, of one process."""
        return self.timed_together(work, rows, 1, batch_size=batch_size, **pairs)

    def timed_together(
        self,
        work: str,
        rows: int,
        processes: int,
        *,
        cores: Sequence[Sequence[int]] = (),
        batch_size: int | None = None,
        **pairs: Any,
    ) -> dict[str, Any]:
        """The same of several processes that share the rows and start their work together."""
        began, started, folders = time.monotonic(), [], []
        for part in range(processes):
            folder = self.folder(work)
            folders.append(folder)
            prompts = folder / "prompts.txt"
            write_prompts(prompts, rows)
            settings = {
                "folder": str(folder),
                "part": (part, processes),
                "cores": cores[part] if cores else None,
                "wait": processes > 1,
                "batch_size": batch_size or self.about["batch_size"],
                "limit_s": self.size.seconds / 3 if batch_size else 10 * self.size.seconds + 600,
            }
            overrides = self.overrides(folder, prompts, **pairs)
            started.append(self.start(work, overrides, **settings))
        found = self._finish_together(started)
        ended = time.monotonic()
        stamps = [stamp for result in found for stamp in result["stamps"]]
        for folder in folders:
            shutil.rmtree(folder)
        times = [at for _, at, _ in stamps]
        return {
            "rate": steady_rate(stamps),
            "rate_while_all_work": steady_rate(stamps, until_first_ends=True),
            "rows": sum(count for _, _, count in stamps),
            "workers": len({worker for worker, _, _ in stamps}),
            "seconds_to_first_batch": min(times) - began,
            "seconds_of_work": max(times) - min(times),
            "seconds_after_last_batch": ended - max(times),
        }

    def _finish_together(self, started: Sequence[subprocess.Popen]) -> list[dict[str, Any]]:
        """Let several processes go when each is ready; none outlives the failure of another."""
        try:
            if len(started) > 1:
                ready = [process.stdout.readline() for process in started if process.stdout]
                for process in started if all(ready) else ():
                    print("go", file=process.stdin, flush=True)
            return [self.finish(process) for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()


def take_turns(contenders: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Every contender once in each round, in turn forwards and backwards."""
    rounds = []
    for number in range(repeats):
        names = list(contenders)[:: -1 if number % 2 else 1]
        found: dict[str, Any] = {}
        for name in names:
            found[name] = contenders[name]()
            say(f"round {number + 1}, {name}: {found[name]['rate']:.2f}/s")
        rounds.append(found)
    return rounds


def compared(
    what: str, target: float, rounds: list[dict[str, Any]], name: str, reference: str
) -> Result:
    """Medians over the rounds; the ratio is that of the median round, not of the medians."""
    kept = [{key: found[key] for key in (name, reference)} for found in rounds]
    ratios = [found[name]["rate"] / found[reference]["rate"] for found in kept]
    for found, ratio in zip(kept, ratios, strict=True):
        found["ratio"] = ratio
    return Result(
        what,
        statistics.median(found[name]["rate"] for found in kept),
        statistics.median(found[reference]["rate"] for found in kept),
        "pairs/s",
        target,
        True,
        (min(ratios), max(ratios)),
        statistics.median(ratios),
        kept,
    )


def write_prompts(path: Path, count: int) -> None:
    """`count` different prompts of about 60 characters, one a line."""
    with open(path, "w") as file:
        for number in range(count):
            rest, picked = number, []
            for words in _WORDS:
                rest, place = divmod(rest, len(words))
                picked.append(words[place])
            adjective, noun, where = picked
            file.write(f"a picture of a {adjective} {noun} {where}, seen from afar, no. {number}\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
