"""What `benchmarks.train` measures: each piece of work runs in a fresh process of its own.

    python -m benchmarks.train_work <work> '<JSON>'

prints one line of JSON at the end.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.train_dmd2 import dmd2
from benchmarks.train_networks import Case, Contestant
from benchmarks.train_ours import ours
from pipelines.computing import prepare_computing

RESULT = "result "
SIDES: dict[str, Callable[[Case], Contestant]] = {"ours": ours, "dmd2": dmd2}
_WARM_UP = 2  # steps: the optimizers' state is made in the first


def main() -> None:
    work, settings = sys.argv[1], json.loads(sys.argv[2])
    if work in ("run", "bare"):
        from benchmarks import train_loops  # not above: Ray's memory is no part of a step's

        found = getattr(train_loops, work)(**settings)
    else:
        threads = settings.pop("threads")
        torch.set_num_threads(threads)
        if settings["side"] == "ours":
            prepare_computing(threads)  # as a worker does
        torch.manual_seed(0)
        case = Case(**settings.pop("case"))
        found = {"speed": speed, "memory": memory}[work](case, **settings)
    print(RESULT + json.dumps(found), flush=True)


# ---------------------------------------------------------------- samples per second


def speed(case: Case, *, side: str, seconds: float) -> dict[str, Any]:
    """Samples per second of one side, over as many steps as last `seconds`."""
    contestant = SIDES[side](case)
    timed(contestant.step, _WARM_UP, case)
    steps = max(1, round(seconds / timed(contestant.step, 1, case)))
    on_processor = time.process_time()
    elapsed = timed(contestant.step, steps, case)
    return {
        "rate": steps * case.batch_size * case.fake_updates / elapsed,
        "cpu_seconds": (time.process_time() - on_processor) / steps,
        "steps": steps,
        "weights": weights_of(contestant),
    }


def timed(step: Callable[[], None], steps: int, case: Case) -> float:
    """Seconds of so many steps."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if case.gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def weights_of(side: Contestant) -> list[int]:
    """Number of weights of each of its networks: both sides must train the same."""
    return [sum(p.numel() for p in module.parameters()) for module in side.modules]


# ---------------------------------------------------------------- peak memory


def memory(case: Case, *, side: str, steps: int) -> dict[str, Any]:
    """Most bytes that were allocated at one time during `steps` steps after the first ones."""
    peak = _peak_of_gpu if case.gpu else _peak_of_cpu
    found = peak(case, side, steps)
    return found | {"max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _peak_of_gpu(case: Case, side: str, steps: int) -> dict[str, Any]:
    contestant = SIDES[side](case)
    timed(contestant.step, _WARM_UP, case)
    torch.cuda.reset_peak_memory_stats()
    timed(contestant.step, steps, case)
    return {"peak": torch.cuda.max_memory_allocated()}


def _peak_of_cpu(case: Case, side: str, steps: int) -> dict[str, Any]:
    """By the events of torch's CPU allocator, from the process's first tensor on."""
    measured = "measured steps"
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        contestant = SIDES[side](case)
        for module in contestant.modules:  # loaded weights lie in a file's pages until copied
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.clone()
        timed(contestant.step, _WARM_UP, case)
        with torch.profiler.record_function(measured):
            timed(contestant.step, steps, case)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    (window,) = [event for event in events if event.name() == measured]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    start = window.start_ns()
    return peak_between(changes, start, start + window.duration_ns())


def peak_between(changes: Sequence[tuple[int, int]], start: int, end: int) -> dict[str, int]:
    """`changes`: (time, bytes allocated or, negative, freed). `rest`: bytes held at `start`;
    `peak`: most bytes held at one time in [start, end]."""
    held, rest, peak = 0, 0, 0
    for at, change in sorted(changes, key=lambda change: change[0]):
        if at > end:
            break
        if at < start:
            rest = held + change
        held += change
        if at >= start:
            peak = max(peak, held)
    return {"peak": max(peak, rest), "rest": rest}


if __name__ == "__main__":
    main()
