"""`dmd pipeline`: one chain at a time, which outlasts a store that is away."""

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from jobs import train
from jobs.errors import Exit
from jobs.pipeline_steps import NAMES
from pipelines import lease
from pipelines.storage import open_store


def test_a_training_outlasts_a_store_that_is_away(pipeline, monkeypatch):
    asked, write = threading.Semaphore(0), lease._write_json

    def refuse(*_):
        asked.release()
        raise OSError("no route to host")

    def train_through_an_outage(session):
        monkeypatch.setattr(lease, "_write_json", refuse)
        for _ in range(8):  # five of them are a period
            assert asked.acquire(timeout=10)
        monkeypatch.setattr(lease, "_write_json", write)
        pipeline.verbs.train(session)

    monkeypatch.setattr(train, "run", train_through_an_outage)
    code, said, ran = pipeline(pairs__lease_seconds=0.5)
    assert code == Exit.OK and ran == list(NAMES), said


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """What a shell starts in the background ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_a_chain_that_was_taken_over_ends_before_it_says_what_it_did(pipeline, monkeypatch):
    def train_until_taken_over(session):
        leases = open_store(str(pipeline.run)).at("steps", "leases")
        record = leases.fs.cat_file(leases.path("000001.json"))
        leases.fs.pipe_file(leases.path("000002.json"), record)
        for _ in range(100):  # until it is interrupted
            time.sleep(0.1)
        pipeline.verbs.train(session)

    monkeypatch.setattr(train, "run", train_until_taken_over)
    code, said, ran = pipeline(pairs__lease_seconds=0.5)
    assert code == Exit.TRANSIENT and "has lost its lease 1" in said and ran == ["regenerate"]
    assert not list(pipeline.run.glob("trainings/*/steps/train.json"))
