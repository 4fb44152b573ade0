"""The timing is measured in a process of its own, and alone where only its place is another."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import evaluation
from pipelines.config import EvaluateSection, PairsSection, StorageSection
from pipelines.evaluation import METRICS, time_again, timing_inputs
from pipelines.storage import open_store
from pipelines.systems import Networks


@pytest.fixture
def asked(monkeypatch) -> list[dict[str, Any]]:
    """What Ray was asked for; each timing is the number of the question."""
    found: list[dict[str, Any]] = []

    def remote(**options):
        found.append(options)
        return lambda function: SimpleNamespace(remote=lambda *arguments: len(found))

    monkeypatch.setattr(evaluation.ray, "remote", remote)
    monkeypatch.setattr(evaluation.ray, "get", lambda number: {"speed_up": number})
    return found


def test_a_timing_is_replaced_and_the_rest_is_kept(tmp_path, asked):
    run, section = open_store(str(tmp_path)), EvaluateSection(gpus_per_actor=1, cpus_per_actor=2)
    before = {"systems": {"student": {"kid": 1}}, "timing": {"speed_up": 9}, "again": "x"}
    found = time_again(
        section,
        PairsSection(),
        run=run,
        networks=Networks("teacher", "student", StorageSection(), threads=3),
        prompts=["fox"],
        metrics=before,
    )
    assert found == before | {"timing": {"speed_up": 1, "inputs": timing_inputs(section, 3)}}
    assert found == json.loads(Path(run.path(METRICS)).read_text())
    # `max_calls`: else Ray uses the process, with its device, again for other work.
    assert asked == [{"num_cpus": 2, "num_gpus": 1, "max_calls": 1}]


def test_what_decides_a_timing(asked):
    section = EvaluateSection()
    same = timing_inputs(section.model_copy(update={"seed": 7, "actors": 3}), None)
    assert same == timing_inputs(section, None) == json.loads(json.dumps(same))
    others = [timing_inputs(section, 2)]
    for change in ({"gpus_per_actor": 1}, {"cpus_per_actor": 4}):
        others.append(timing_inputs(section.model_copy(update=change), None))
    placed = EvaluateSection.model_validate({"placement": {"accelerator_type": "H100"}})
    others.append(timing_inputs(placed, None))
    assert all(other != same for other in others)
