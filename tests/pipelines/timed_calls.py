"""What runs inside of the calls that `measure_speed` times: which network, how many rows, in which
dtype and memory layout."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from pipelines import timing
from pipelines.systems import Networks, SamplingPlan

Rows = dict[str, list[tuple[int, int]]]


@dataclass
class TimedCalls:
    """`measured`: what `measure_speed` returned. `rows`: system → rows of the teacher's network and
    of the student's, for each timed call. Of each: `dtypes`, of what the linear and convolutional
    layers of network and text encoders gave, and `strides`, of the network's weights."""

    measured: dict[str, Any]
    rows: Rows
    dtypes: dict[str, set[torch.dtype]]
    strides: dict[str, list[tuple[int, ...]]]


class _Watch:
    """Notes of two networks, by forward hooks."""

    def __init__(self) -> None:
        self.networks: dict[str, nn.Module] = {}
        self.rows: Counter[str] = Counter()
        self.dtypes: dict[str, set[torch.dtype]] = {"teacher": set(), "student": set()}

    def add(self, name: str, pipeline: Any) -> None:
        family = timing.family_of_pipeline(pipeline)
        network = self.networks[name] = getattr(pipeline, family.model)
        network.register_forward_hook(
            lambda module, args, output: self.rows.update({name: len(output[0])})
        )
        encoders = [part for key, part in pipeline.components.items() if "text_enc" in key]
        for layer in (layer for part in (network, *encoders) if part for layer in part.modules()):
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.register_forward_hook(
                    lambda module, args, output: self.dtypes[name].add(output.dtype)
                )


def timed_calls(
    plan: SamplingPlan,
    networks: Networks,
    prompts: tuple[str, ...],
    repeats: int,
    layout: Callable[[nn.Module], Any] = lambda network: network,
) -> TimedCalls:
    """`layout` is applied to the teacher's network when it is loaded, as on a GPU."""
    watch, reads = _Watch(), []
    load_teacher, load_plainly = timing.load_teacher, timing.load_plainly
    clock = timing.time.perf_counter

    def teacher(*args: Any, **kwargs: Any) -> Any:
        loaded = load_teacher(*args, **kwargs)
        layout(loaded.model)
        watch.add("teacher", loaded.pipeline)
        return loaded

    def student(*args: Any) -> Any:
        pipeline = load_plainly(*args)
        watch.add("student", pipeline)
        return pipeline

    def read() -> float:
        reads.append((watch.rows["teacher"], watch.rows["student"]))
        return clock()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "load_teacher", teacher)
        patch.setattr(timing, "load_plainly", student)
        patch.setattr(timing.time, "perf_counter", read)
        measured = timing.measure_speed(plan, networks, prompts, repeats)
    calls = [
        (end[0] - start[0], end[1] - start[1])
        for start, end in zip(reads[::2], reads[1::2], strict=True)
    ]
    systems = list(measured["seconds_per_picture"])
    strides = {name: [p.stride() for p in n.parameters()] for name, n in watch.networks.items()}
    rows = {name: calls[at :: len(systems)] for at, name in enumerate(systems)}
    return TimedCalls(measured, rows, watch.dtypes, strides)


def rows_of(evaluations: dict[str, int], repeats: int) -> Rows:
    """What `TimedCalls.rows` is where each system makes these network evaluations a picture."""
    return {
        name: [(0, count) if name == "student" else (count, 0)] * repeats
        for name, count in evaluations.items()
    }
