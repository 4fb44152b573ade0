"""How fast is the pair factory? Each number beside a reference of the same run on the same machine.

    python -m benchmarks.pairs                            all of it: 50 minutes on two CPU cores
    python -m benchmarks.pairs --quick                    does it run? seconds of work; says nothing
    python -m benchmarks.pairs --only landing,sealing

Prints a table; a run of all parts writes `benchmarks/results/pairs.json`, any other run the file of
`--out`, with every round. A missed target is reported, and is no error. The machine should have
nothing else to do: its load is in the results.

Pairs per second count from the first finished batch to the last, or, of several workers, from when
each has finished one. So they hold neither start-up (Ray, imports, the teacher, the first batch)
nor sealing, which the results state apart. Contenders run in fresh processes one after another, in
turn forwards and backwards, so that a machine that slows down slows all of them; a ratio is taken
within a round, and the median round counts. All use the same number of torch threads.

- overhead: `fill_order` on an embedded Ray, one worker, against a loop written by hand over the
  same `Teacher.solve`, encoding and Parquet files. The loop runs while no Ray does.
- pipeline: with and without `pairs.compile`, against `StableDiffusionPipeline.__call__` with the
  same full batches, to latents. It draws its own noise and stores nothing, which favours it.
  Compiling ends before the first batch does, so it is stated apart with the rest of the start-up.
- single: without `pairs.compile`, against that call with one prompt at a time, for a third of the
  time.
- actors: two workers of one torch thread on two cores, against two plain processes, each bound to
  one core. Ray's own processes share those two cores. Always on the CPU.
- landing: a text file of prompts of about 60 characters, in a fresh process. The peak memory
  holds torch and Ray, which landing does not need.
- sealing: made-up pairs with 4×4×4 tensors, 4096 to a file, in threads and on a Ray that is
  running already. The files have just been written, so they are read from memory, not from disk.
- regenerate: the command line from start to end, with nothing to do, on that data set.
- reading: shuffled training batches against a scan by all of pyarrow's threads in file order, both
  from memory; files as the factory writes them, latents of the teacher and of Stable Diffusion.
  "checked scan" compares the checksum of each page, as the reader does.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import memory_gb, processor, versions
from benchmarks.pair_bench import Bench, Result, compared, say, take_turns, write_prompts

RESULTS = Path(__file__).parent / "results" / "pairs.json"
SPEED = ("overhead", "pipeline", "single")
LARGE = ("landing", "sealing", "regenerate")
PARTS = (*SPEED, "actors", *LARGE, "reading")
_SEALED_SHAPE, _SEALED_FILE_ROWS = (4, 4, 4), 4096
_STABLE_DIFFUSION = (4, 64, 64)
_BATCH_SIZES = (64, 256)
_SCANS = {"scan": "scan", "scan_checked": "checked scan"}
_LIBRARIES = ("ray", "torch", "diffusers", "transformers", "pyarrow", "numpy")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="demo", help="recipe of teacher and sampler")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--quick", action="store_true", help="does it run? the numbers say nothing")
    parser.add_argument("--only", type=_parts, default=PARTS, metavar=",".join(PARTS))
    parser.add_argument("--repeats", type=int, help="rounds; 3 if not told")
    parser.add_argument("--out", type=Path, help="JSON file; told here unless all is run")
    parser.add_argument("--workdir", type=Path, help="where 4 GB are free; left as it was")
    options = parser.parse_args(arguments)
    load = os.getloadavg()
    if options.workdir:
        options.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dmd-bench-", dir=options.workdir) as workdir:
        bench = Bench(options, Path(workdir))
        results = []
        for measure, parts in (
            (measure_speed, SPEED),
            (measure_actors, ("actors",)),
            (measure_large_set, LARGE),
            (measure_reading, ("reading",)),
        ):
            wanted = [part for part in options.only if part in parts]
            if wanted:
                results += measure(bench, wanted)
    report = {
        "results": [{**asdict(result), "met": result.met} for result in results],
        "settings": {
            "config": options.config,
            "overrides": bench.common,
            **{name: value for name, value in bench.about.items() if name != "cuda"},
            **asdict(bench.size),
            "quick": options.quick,
        },
        "hardware": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_gb": memory_gb(),
            "gpu": bench.about["cuda"],
            "load_before_and_after": [load, os.getloadavg()],
        },
        "versions": versions(_LIBRARIES),
    }
    _print_table(report, results)
    whole = not options.quick and set(options.only) == set(PARTS)
    out = options.out or (RESULTS if whole else None)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"written to {out}")
    return 0


def measure_speed(bench: Bench, wanted: Sequence[str]) -> list[Result]:
    """`dmd pairs` with one worker against the loops that do without it."""
    pairs = {"actors": 1, "gpus_per_actor": bench.gpus}
    rows = bench.rows_for(bench.size.seconds, 1, **pairs)
    contenders = {
        "factory": lambda: bench.timed("factory", rows, **pairs),
        "compiled": lambda: bench.timed("factory", rows, compile="true", **pairs),
        "overhead": lambda: bench.timed("hand_written", rows, **pairs),
        "pipeline": lambda: bench.timed("pipeline_calls", rows, **pairs),
        "single": lambda: bench.timed("pipeline_calls", rows, batch_size=1, **pairs),
    }
    comparisons = {
        "overhead": [("dmd pairs / loop by hand", 0.97, "factory")],
        "pipeline": [
            ("dmd pairs / pipeline call, same batches", 1.0, "factory"),
            ("the same with pairs.compile", 1.3 if bench.gpus else 1.0, "compiled"),
        ],
        "single": [("dmd pairs / pipeline call, one prompt", 3.0, "factory")],
    }
    names = ["factory", *(["compiled"] if "pipeline" in wanted else []), *wanted]
    rounds = take_turns({name: contenders[name] for name in names}, bench.size.repeats)
    return [
        compared(what, target, rounds, ours, name)
        for name in wanted
        for what, target, ours in comparisons[name]
    ]


def measure_actors(bench: Bench, wanted: Sequence[str]) -> list[Result]:
    """Two workers on two cores against two processes."""
    pairs = {"gpus_per_actor": 0, "threads_per_actor": 1}
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0, 1]
    cores = available[:2]
    if len(cores) < 2:
        say("actors: left out, for this process may use one core only")
        return []
    rows = bench.rows_for(bench.size.seconds, 2, **pairs)
    contenders = {
        "factory": lambda: bench.timed_together(
            "factory", rows, 1, cores=[cores], actors=2, **pairs
        ),
        "processes": lambda: bench.timed_together(
            "hand_written", rows, 2, cores=[[core] for core in cores], actors=1, **pairs
        ),
    }
    rounds = take_turns(contenders, bench.size.repeats)
    what = "dmd pairs, 2 actors / 2 processes"
    return [compared(what, 0.95, rounds, "factory", "processes")]


def measure_large_set(bench: Bench, wanted: Sequence[str]) -> list[Result]:
    """Landing, sealing and "nothing to do" at a million rows."""
    size, results = bench.size, []
    prompts = bench.folder("prompts") / "prompts.txt"
    write_prompts(prompts, size.rows)
    rounds, run = [], Path()
    for number in range(size.repeats if "landing" in wanted else 1):
        run = bench.folder("large")
        rounds.append(bench.run("landing", bench.overrides(run, prompts)))
        say(f"round {number + 1}, landing: {rounds[-1]['seconds']:.1f} s")
    overrides = bench.overrides(run, prompts)
    if "landing" in wanted:
        seconds = [found["seconds"] for found in rounds]
        peaks = [found["peak_bytes"] / 1e9 for found in rounds]
        what = f"land {size.rows:,} prompts"
        results.append(_limited(what, seconds, "s", 60, rounds))
        results.append(_limited(f"{what}: peak memory", peaks, "GB", 1, rounds))
    if "sealing" not in wanted and "regenerate" not in wanted:
        return results
    bench.run("made_pairs", overrides, shape=_SEALED_SHAPE, rows=_SEALED_FILE_ROWS)
    found = bench.run("sealing", overrides, repeats=size.repeats if "sealing" in wanted else 1)
    if "sealing" in wanted:
        for how, name in (("threads", "in threads"), ("ray", "on Ray")):
            seconds = found["seconds"][how]
            say(f"sealing {name}: {', '.join(f'{s:.1f}' for s in seconds)} s")
            results.append(_limited(f"seal {size.rows:,} rows {name}", seconds, "s", 60, seconds))
    if "regenerate" in wanted:
        seconds = [_regenerate(bench, overrides, run) for _ in range(size.repeats)]
        what = f"regenerate {size.rows:,} rows, nothing to do"
        results.append(_limited(what, seconds, "s", 15, seconds))
    return results


def measure_reading(bench: Bench, wanted: Sequence[str]) -> list[Result]:
    """Training batches against a plain scan."""
    results = []
    shapes = (("teacher's", bench.about["shape"]), ("SD 1.5", _STABLE_DIFFUSION))
    for (name, shape), rows in zip(shapes, bench.size.reading_rows, strict=True):
        folder = bench.folder("reading")
        write_prompts(folder / "prompts.txt", rows)
        overrides = bench.overrides(folder, folder / "prompts.txt")
        bench.run("landing", overrides)
        bench.run("made_pairs", overrides, shape=shape, rows=bench.about["rows_per_block"])
        settings = {
            "repeats": bench.size.repeats,
            "limit_s": bench.size.reading_s,
            "batch_sizes": _BATCH_SIZES,
        }
        rounds = bench.run("reading", overrides, **settings)["rounds"]
        for size, (scan, of) in itertools.product(_BATCH_SIZES, _SCANS.items()):
            what = f"batches of {size} / {of}, {name} latents"
            ratios = [found[str(size)] / found[scan] for found in rounds]
            measured, scanned = (
                statistics.median(found[key] for found in rounds) for key in (str(size), scan)
            )
            ratio, spread = statistics.median(ratios), (min(ratios), max(ratios))
            results.append(
                Result(what, measured, scanned, "rows/s", 0.7, True, spread, ratio, rounds)
            )
            say(f"{what}: {ratio:.2f}")
    return results


def _regenerate(bench: Bench, overrides: list[str], run: Path) -> float:
    """Seconds of the whole command."""
    settings = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "jobs.regenerate", "--config", bench.config, "--json"]
    started = time.monotonic()
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode or json.loads(done.stdout)["generated"]:
        raise SystemExit(f"regenerate was to find nothing to do in {run}:\n{done.stderr[-4000:]}")
    say(f"regenerate: {seconds:.1f} s")
    return seconds


def _limited(what: str, found: list[float], unit: str, limit: float, rounds: list[Any]) -> Result:
    spread = min(found), max(found)
    return Result(what, statistics.median(found), None, unit, limit, False, spread, None, rounds)


def _print_table(report: dict[str, Any], results: Sequence[Result]) -> None:
    hardware = report["hardware"]
    print(
        f"{hardware['processor']}, {hardware['cores']} cores, {hardware['memory_gb']} GB, "
        f"GPU: {hardware['gpu'] or 'none'}"
    )
    if report["settings"]["quick"]:
        print("--quick: these numbers say nothing")
    print(
        f"{'what':48} {'measured':>20} {'reference':>12} {'ratio':>7} {'spread':>15} "
        f"{'target':>8}  met"
    )
    for result in results:
        measured = f"{result.measured:,.2f} {result.unit}"
        reference = "" if result.reference is None else f"{result.reference:,.2f}"
        ratio = "" if result.ratio is None else f"{result.ratio:.3f}"
        target = f"{'≥' if result.higher else '≤'} {result.target:g}"
        met = "yes" if result.met else "NO"
        spread = "{:.3g} … {:.3g}".format(*result.spread)
        print(
            f"{result.what:48} {measured:>20} {reference:>12} {ratio:>7} {spread:>15} "
            f"{target:>8}  {met}"
        )


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = set(names) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}"
        )
    return names


if __name__ == "__main__":
    raise SystemExit(main())
