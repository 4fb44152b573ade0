"""How fast is a training step, and how much memory does it take, beside DMD2's own scripts?

    python -m benchmarks.train --dmd2 <clone>             all of it: an hour on two CPU cores
    python -m benchmarks.train --dmd2 <clone> --quick     does it run? it says nothing
    python -m benchmarks.train --only loop,checkpoint     needs no clone
    python -m benchmarks.train --dmd2 <clone> --only sd,edm --size full --gpu

Prints a table; `--out` keeps it as JSON, with every round. A missed target is reported, and is no
error. The machine should have nothing else to do: its load is in the results.

- sd, edm: a whole iteration of `StepSource.draw` and `DmdTrainer.step` against `train_one_step` of
  tianweiy/DMD2's train_sd.py and train_edm.py, which run as they are: same networks, batch,
  precision, losses, optimizer and updates; no pairs, no R1, no moving average, which theirs does
  not have. Both draw their noise and encode their prompts in a step; ours also splits prompts into
  tokens. Reading data, logging and pictures are left out on both sides. Theirs in bfloat16 asks for
  CUDA's autocast; on a CPU it is given the CPU's. Its EDM network has bfloat16 on CUDA only.
- Samples per second: each side in fresh processes, in turn forwards and backwards, after two steps;
  ours is given what a worker is given (`prepare_computing`). A ratio is taken within a round, and
  the median round counts. `cpu_seconds` of a round is the time that a step spent on the processor:
  it says more than the rate where the machine had something else to do.
- Peak memory: each side in a fresh process, the most bytes that torch's allocator held at one time
  during a step, the first ones left out: on CUDA its own count, on a CPU the sum over all of its
  allocations as torch.profiler lists them. So it holds weights, gradients, optimizer state and
  activations; it does not hold Python, libraries and what oneDNN takes for itself, which would
  hide the difference (they are in `max_rss`). Frozen VAE and text encoder are the same on both
  sides and are not counted.
- loop: `dmd train` with one worker on an embedded Ray against a loop by hand that only draws and
  steps, fresh processes in turn. Ray's own processes share the cores. From the tenth step on.
- checkpoint: what a save costs, for 100 steps without one. One run of `dmd train` saves every 40
  steps: the 20 steps after a save, beside which it goes on, against the 20 before it and the 20
  that follow. Two runs would differ by more than a save costs.

`--gpu` and `--size full` (Stable Diffusion 1.5 and EDM's ImageNet network, of random weights) have
not been run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import processor, versions
from benchmarks.pair_bench import Result, compared, say, take_turns, write_prompts
from benchmarks.train_networks import SIZES, Case, write_teacher
from benchmarks.train_windows import seconds_per_save

SIDES = ("ours", "dmd2")
PARTS = ("sd", "edm", "loop", "checkpoint")
FASTER, LEANER, OVERHEAD = 1.2, 0.8, 0.98
_LIBRARIES = ("ray", "torch", "diffusers", "transformers", "accelerate", "numpy")
_WARM_UP = 10  # steps of a run that do not count
_CHECKPOINT_EVERY = 40  # steps, while it is measured: an even number of log lines
_STEPS_PER_CHECKPOINT = 100  # what its cost is set against


@dataclass(frozen=True)
class Size:
    """`seconds` for each side in each round of a comparison, `steps` of each run of a loop."""

    seconds: float
    repeats: int
    loop_steps: int
    checkpoint_steps: int


FULL = Size(10, 5, 60, 420)
QUICK = Size(0.2, 1, 20, 120)


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    load = os.getloadavg()
    size = QUICK if options.quick else FULL
    for name in ("repeats", "seconds"):
        if getattr(options, name) is not None:
            size = replace(size, **{name: getattr(options, name)})
    with tempfile.TemporaryDirectory(prefix="dmd-bench-", dir=options.workdir) as workdir:
        bench = Bench(options, size, Path(workdir))
        results = list(bench.measure())
    report = {
        "results": [{**asdict(result), "met": result.met} for result in results],
        "settings": {
            **{
                name: getattr(options, name)
                for name in ("size", "batch_size", "micro_batch_size", "fake_updates", "threads")
            },
            **asdict(size),
            "quick": options.quick,
        },
        "hardware": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "gpu": _gpu() if options.gpu else None,
            "load_before_and_after": [load, os.getloadavg()],
        },
        "versions": versions(_LIBRARIES),
    }
    _print_table(report, results)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"written to {options.out}")
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train")
    parser.add_argument("--dmd2", type=Path, help="clone of tianweiy/DMD2 (sd and edm)")
    parser.add_argument("--only", type=_parts, default=PARTS, metavar=",".join(PARTS))
    parser.add_argument("--size", choices=SIZES, help="of the networks of sd and edm; small")
    parser.add_argument("--batch-size", type=int, help="of sd and edm; 16")
    parser.add_argument("--micro-batch-size", type=int, help="of ours only; its whole batch")
    parser.add_argument("--fake-updates", type=int, default=1, help="per generator update")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--quick", action="store_true", help="does it run? the numbers say nothing")
    parser.add_argument("--repeats", type=int, help="rounds; 5 if not told")
    parser.add_argument("--seconds", type=float, help="of each side in a round of sd and edm; 10")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--workdir", type=Path, help="where 2 GB are free; left as it was")
    options = parser.parse_args(arguments)
    if options.dmd2 is None and {"sd", "edm"} & set(options.only):
        parser.error("sd and edm need --dmd2, a clone of tianweiy/DMD2")
    options.size = options.size or ("tiny" if options.quick else "small")
    options.batch_size = options.batch_size or (4 if options.quick else 16)
    return options


class Bench:
    """Starts the measured processes."""

    def __init__(self, options: argparse.Namespace, size: Size, workdir: Path) -> None:
        self.options, self.size, self.workdir = options, size, workdir
        self._count = 0

    def measure(self) -> Iterator[Result]:
        if "sd" in self.options.only:
            write_teacher(self.options.size, self.workdir / "teacher")
        for part in self.options.only:
            if part in ("sd", "edm"):
                for case in self._cases(part):
                    yield self._speed(case)
                    yield self._memory(case)
            else:
                yield self._loop() if part == "loop" else self._checkpoint()

    # ------------------------------------------------------------ beside DMD2

    def _cases(self, path: Any) -> Iterator[Case]:
        options = self.options
        for precision in ("no", "bf16") if path == "sd" or options.gpu else ("no",):
            for gan in (False, True):
                yield Case(
                    path=path,
                    gan=gan,
                    precision=precision,
                    batch_size=options.batch_size,
                    fake_updates=options.fake_updates,
                    size=options.size,
                    folder=str(self.workdir / "teacher"),
                    clone=str(options.dmd2.absolute()),
                    gpu=options.gpu,
                    micro_batch_size=options.micro_batch_size,
                )

    def _speed(self, case: Case) -> Result:
        settings = {"case": asdict(case), "seconds": self.size.seconds}
        contenders = {side: partial(self._work, "speed", side=side, **settings) for side in SIDES}
        rounds = take_turns(contenders, self.size.repeats)
        ours, theirs = (rounds[0][side]["weights"] for side in SIDES)
        if ours != theirs:
            raise SystemExit(f"{case.name}: ours has {ours} weights, theirs {theirs}")
        return self._ratio(f"{case.name}: samples/s", FASTER, rounds, *SIDES)

    def _memory(self, case: Case) -> Result:
        found = {
            side: self._work("memory", case=asdict(case), side=side, steps=2) for side in SIDES
        }
        return leaner(f"{case.name}: peak memory", found)

    # ------------------------------------------------------------ around the step

    def _loop(self) -> Result:
        steps = self.size.loop_steps
        contenders = {name: self._run(name, steps, 10 * steps) for name in ("run", "bare")}
        rounds = take_turns(contenders, self.size.repeats)
        return self._ratio("dmd train / loop by hand", OVERHEAD, rounds, "run", "bare")

    def _checkpoint(self) -> Result:
        found = self._run("run", self.size.checkpoint_steps, _CHECKPOINT_EVERY)()
        windows = found["windows"]
        costs = seconds_per_save(windows, _CHECKPOINT_EVERY // _WARM_UP)
        without = statistics.median(windows[1:]) * _STEPS_PER_CHECKPOINT / _WARM_UP
        ratios = [without / (without + cost) for cost in costs]
        ratio = without / (without + statistics.median(costs))
        rate = found["batch"] * _STEPS_PER_CHECKPOINT / without
        what = f"dmd train, checkpoint every {_STEPS_PER_CHECKPOINT} / none"
        say(f"{what}: {ratio:.3f}; a save costs {statistics.median(costs):.2f} s")
        spread = min(ratios), max(ratios)
        rounds = [{"seconds_per_save": costs, "windows": windows}]
        return Result(what, rate * ratio, rate, "samples/s", OVERHEAD, True, spread, ratio, rounds)

    def _run(self, work: str, steps: int, checkpointing_steps: int) -> Any:
        def measured() -> dict[str, Any]:
            self._count += 1
            folder = self.workdir / f"{self._count:03d}-{work}"
            folder.mkdir()
            write_prompts(folder / "prompts.txt", 512)
            train = {
                "unpaired_prompts": folder / "prompts.txt",
                "max_train_steps": steps,
                "lambda_reg": 0,
                "regression_batch_size": 0,
                "logging_steps": _WARM_UP,
                "checkpointing_steps": checkpointing_steps,
                "validation_steps": 10 * steps,
                "threads_per_worker": self.options.threads,
                "use_gpu": self.options.gpu,
            }
            overrides = [f"run.dir={folder / 'run'}", f"pairs.prompts={folder / 'prompts.txt'}"]
            overrides += [f"train.{name}={value}" for name, value in train.items()]
            return self._work(work, config="demo", overrides=overrides, warm_up=_WARM_UP)

        return measured

    # ------------------------------------------------------------ both

    def _ratio(
        self, what: str, target: float, rounds: list[dict[str, Any]], name: str, reference: str
    ) -> Result:
        result = replace(compared(what, target, rounds, name, reference), unit="samples/s")
        say(f"{what}: {result.ratio:.3f}")
        return result

    def _work(self, work: str, **settings: Any) -> dict[str, Any]:
        """The result of one fresh process."""
        if work in ("speed", "memory"):
            settings["threads"] = self.options.threads
        command = [sys.executable, "-m", "benchmarks.train_work", work, json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
        if done.returncode or not lines:
            raise SystemExit(f"{work} ended with code {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(lines[-1].removeprefix("result "))


def leaner(what: str, found: dict[str, Any]) -> Result:
    """Peak memory of "ours" against that of "dmd2", measured once: it does not vary."""
    ours, theirs = found["ours"]["peak"] / 1e6, found["dmd2"]["peak"] / 1e6
    ratio = ours / theirs
    say(f"{what}: {ratio:.3f}")
    return Result(what, ours, theirs, "MB", LEANER, False, (ratio, ratio), ratio, [found])


def _print_table(report: dict[str, Any], results: list[Result]) -> None:
    hardware, settings = report["hardware"], report["settings"]
    print(
        f"{hardware['processor']}, {hardware['cores']} cores, {settings['threads']} threads, "
        f"GPU: {hardware['gpu'] or 'none'}; networks {settings['size']}, batches of "
        f"{settings['batch_size']}"
    )
    if settings["quick"]:
        print("--quick: these numbers say nothing")
    print(
        f"{'what':52} {'measured':>18} {'reference':>10} {'ratio':>6} {'spread':>15} "
        f"{'target':>7}  met"
    )
    for result in results:
        measured = f"{result.measured:,.2f} {result.unit}"
        target = f"{'≥' if result.higher else '≤'} {result.target:g}"
        spread = "{:.3g} … {:.3g}".format(*result.spread)
        print(
            f"{result.what:52} {measured:>18} {result.reference:>10,.2f} {result.ratio:>6.3f} "
            f"{spread:>15} {target:>7}  {'yes' if result.met else 'NO'}"
        )


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name()


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
