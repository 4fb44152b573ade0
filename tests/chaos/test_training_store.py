"""`dmd train` into an S3 server that loses uploads, or is gone for a while."""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from dmd_core.checkpoint import Checkpoint, checkpoint_path, committed_steps
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import Store
from tests.chaos.training_here import EVERY, STEPS, assert_same, final, train_here, write_prompts
from tests.fault_proxy import Fault, FaultProxy
from tests.s3_servers import new_bucket

OUTAGE_S = 60
FAULTS = (Fault.SLOW_DOWN, Fault.LOST_REQUEST, Fault.LOST_REPLY, Fault.TORN_UPLOAD)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


@pytest.fixture
def proxy(seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed) as found:
        yield found


@pytest.fixture(scope="module")
def train(ray_cluster, tiny_teacher_dir, tmp_path_factory) -> Callable[[Store, str], int]:
    prompts = write_prompts(tmp_path_factory.mktemp("prompts"))
    return lambda root, endpoint: train_here(root, tiny_teacher_dir, prompts, endpoint)


@pytest.fixture(scope="module")
def undisturbed(train, seaweed, seaweed_options) -> Checkpoint:
    root = new_bucket(seaweed_options, "plain")
    assert train(root, seaweed) == 0
    return final(root)


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
