"""`dmd train` into an S3 server that loses uploads, or is gone for a while."""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest
import torch

from dmd_core.checkpoint import Checkpoint, checkpoint_path, committed_steps, load_checkpoint
from jobs.cli import main
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import Store
from tests.chaos.training_run import metric_lines
from tests.fault_proxy import Fault, FaultProxy
from tests.s3_servers import new_bucket

STEPS, EVERY = 40, 4
OUTAGE_S = 20
FAULTS = (Fault.SLOW_DOWN, Fault.LOST_REQUEST, Fault.LOST_REPLY, Fault.TORN_UPLOAD)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


@pytest.fixture
def proxy(seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed) as found:
        yield found


@pytest.fixture(scope="module")
def train(ray_cluster, tiny_teacher_dir, tmp_path_factory) -> Callable[[Store, str], int]:
    """`dmd train` in this process, on the Ray of the test session."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {index}" for index in range(12)))

    def run(root: Store, endpoint: str) -> int:
        settings = {
            "run.dir": root.url, "storage.endpoint_url": endpoint,
            "teacher.path": tiny_teacher_dir, "pairs.prompts": prompts,
            "train.lambda_reg": 0, "train.train_batch_size": 16,
            "train.max_train_steps": STEPS, "train.checkpointing_steps": EVERY,
            "train.checkpoints_total_limit": 20, "train.validation_steps": 1000,
            "train.report_to": "none",
        }  # fmt: skip
        arguments = ["train", "--config", "tiny", "--json"]
        for key, value in settings.items():
            arguments += ["--set", f"{key}={value}"]
        started = time.monotonic()
        code = main(arguments)
        print(f"exit code {code} after {time.monotonic() - started:.0f} s")
        return code

    return run


@pytest.fixture(scope="module")
def undisturbed(train, seaweed, seaweed_options) -> Checkpoint:
    root = new_bucket(seaweed_options, "plain")
    assert train(root, seaweed) == 0
    return final(root)


def final(root: Store) -> Checkpoint:
    """Every checkpoint is loaded and verified, and nothing else is there; each step has a line."""
    folder = root.path(CHECKPOINTS)
    steps = committed_steps(root.fs, folder)
    found = [load_checkpoint(root.fs, folder, step) for step in steps]
    assert steps[-1] == STEPS
    there = {path.split("/checkpoint-")[1][:8] for path in root.fs.find(folder)}
    torn = there - {f"{step:08d}" for step in steps}
    print(f"checkpoints {steps}, without a marker {sorted(torn)}")
    lines = metric_lines(root.fs.cat_file(root.path("metrics.jsonl")))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    last = found[-1]
    assert last is not None
    return last


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    """One worker in both: bit for bit, whatever was done again."""
    assert found.state["progress"] == expected.state["progress"]
    for part, tensors in expected.parts.items():
        for name, value in tensors.items():
            assert torch.equal(value, found.parts[part][name]), f"{part}/{name}"


def test_uploads_that_fail(train, proxy, seaweed_options, undisturbed):
    """Single requests of checkpoints at random, and all those of one file of one checkpoint."""
    seed = random.SystemRandom().randrange(1 << 30)
    rng, root = random.Random(seed), new_bucket(seaweed_options, "uploads")
    lost = EVERY * rng.randrange(2, STEPS // EVERY - 1)
    print(f"seed {seed}: the fake score of step {lost} cannot be stored")
    refused = checkpoint_path(CHECKPOINTS, lost) + "/fake-"
    proxy.inject(Fault.LOST_REQUEST, method="PUT", path=refused, times=10_000)
    for at in sorted(rng.sample(range(300), 40)):
        proxy.inject(rng.choice(FAULTS), path=f"/{CHECKPOINTS}/", at=at)
    assert train(root, proxy.url) == 0
    hits = [hit for hit in proxy.hits if refused not in hit.path]
    print(f"{len(hits)} requests met a fault, and {len(proxy.hits) - len(hits)} of step {lost}")
    assert len(hits) >= 10
    assert_same(final(root), undisturbed)
    assert lost not in committed_steps(root.fs, root.path(CHECKPOINTS))


@contextmanager
def refusing(proxy: FaultProxy) -> Iterator[None]:
    """Every connection is closed at once."""
    proxy.inject(Fault.LOST_REQUEST, times=1_000_000)
    yield
    proxy.clear()


@contextmanager
def frozen(proxy: FaultProxy) -> Iterator[None]:
    """The server takes connections and says nothing."""
    mine = psutil.Process().children(recursive=True)
    (server,) = [each for each in mine if {"mini"} & set(each.cmdline()) and "weed" in each.name()]
    server.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("gone", [refusing, frozen])
def test_a_server_that_is_gone_for_a_while(train, proxy, seaweed_options, undisturbed, gone):
    seed = random.SystemRandom().randrange(1 << 30)
    rng, root = random.Random(seed), new_bucket(seaweed_options, gone.__name__)
    after = EVERY * rng.randrange(1, STEPS // EVERY - 2)
    print(f"seed {seed}: gone after step {after}")
    over = threading.Event()

    def outage() -> None:
        while not over.is_set():
            if after in committed_steps(root.fs, root.path(CHECKPOINTS)):
                with gone(proxy):
                    time.sleep(OUTAGE_S)
                return
            time.sleep(0.1)

    thread = threading.Thread(target=outage)
    thread.start()
    try:
        code = train(root, proxy.url)
        if code:
            print("started again")
            thread.join()
            assert code == 4 and train(root, proxy.url) == 0
    finally:
        over.set()
        thread.join()
    assert_same(final(root), undisturbed)
