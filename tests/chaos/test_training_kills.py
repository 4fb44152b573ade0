"""Workers, nodes and the driver of an elastic training die (SIGKILL) at random instants.

Every run goes on by itself, or when the same command is given again, and ends as if nothing had
happened. A seed decides one death: when it comes, and whom it takes.
"""

import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.lease import newest_fence
from pipelines.storage import open_store
from tests.chaos.training_run import (
    TrainingRun,
    add_node,
    all_workers,
    assert_same_training,
    chaos_settings,
    small_cluster,
    train_workers,
)

STEPS = 100
NODES = 2
BASE = random.SystemRandom().randrange(1 << 30)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Death:
    """`at`: the step whose checkpoint is awaited first; `delay`: seconds after that; `share`: of
    what may be hit, which one; `all`: the whole group at once."""

    seed: int
    at: int
    delay: float
    share: float
    all: bool

    @staticmethod
    def draw(seed: int, first: int, last: int) -> "Death":
        rng = random.Random(seed)
        at, delay = rng.randrange(first, last), rng.uniform(0, 1.5)
        death = Death(seed, at, delay, rng.random(), rng.random() < 0.3)
        print(death)
        return death

    def choose(self, candidates: list) -> list:
        return candidates if self.all else [candidates[int(self.share * len(candidates))]]


def deaths(case: int, count: int, *, until: float = 0.7) -> list[Death]:
    """In the order of their steps, each in its own stretch of the run, whose end is left free."""
    stretch = int(STEPS * until) // count
    return [Death.draw(BASE + 100 * case + i, i * stretch, (i + 1) * stretch) for i in range(count)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    with small_cluster(NODES) as found:
        yield found


@pytest.fixture(scope="module")
def settings(cluster, tiny_teacher_dir, tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("prompts")
    return chaos_settings(cluster, tiny_teacher_dir, folder, steps=STEPS)


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory) -> TrainingRun:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with TrainingRun(settings | {"train.num_workers": 1}, folder) as run:
        started = time.monotonic()
        run.finish()
        print(f"undisturbed: {time.monotonic() - started:.0f} s")
    return run


@pytest.fixture
def run(settings, tmp_path: Path) -> Iterator[TrainingRun]:
    with TrainingRun(settings, tmp_path / "run") as found:
        yield found


def wait_for(run: TrainingRun, death: Death) -> int:
    """Until its instant; returns the newest checkpoint's step."""
    run.wait_until(lambda: run.newest_step() > death.at, f"a checkpoint after step {death.at}")
    time.sleep(death.delay)
    return run.newest_step()


def test_workers_die(run, cluster, undisturbed):
    run.start()
    for death in deaths(1, 5):
        wait_for(run, death)
        run.wait_until(lambda: bool(all_workers(cluster)), "a worker")
        found = all_workers(cluster)
        victims = death.choose(found)
        for victim in victims:
            victim.kill()
        print(f"killed {len(victims)} of {len(found)} workers at step {run.newest_step()}")
    run.finish()
    assert_same_training(run, undisturbed, STEPS)


def test_nodes_die_and_come_back(run, cluster, undisturbed):
    """Ray takes some ten seconds to tell the group of a new node, so it comes early."""
    run.start()
    first, second = deaths(2, 2, until=0.4)
    lose_a_node(run, cluster, first)
    add_node(cluster)
    run.wait_until(lambda: len(all_workers(cluster)) == NODES, "a group that has grown again")
    print(f"two workers again at step {run.newest_step()}")
    lose_a_node(run, cluster, second)
    add_node(cluster)
    run.finish()
    assert_same_training(run, undisturbed, STEPS)


def lose_a_node(run: TrainingRun, cluster, death: Death) -> None:
    """Until the group goes on with the other one."""
    run.wait_until(lambda: len(all_workers(cluster)) == NODES, "a worker on every node")
    before = wait_for(run, death)
    nodes = sorted(cluster.worker_nodes, key=lambda node: node.node_id)
    lost = nodes[int(death.share * len(nodes))]
    lost.all_processes["raylet"][0].process.kill()  # its workers notice by themselves
    cluster.remove_node(lost, allow_graceful=False)
    print(f"killed a node at step {before}")
    (other,) = cluster.worker_nodes
    run.wait_until(lambda: run.newest_step() > before, "a step on the other node")
    assert len(train_workers(other)) == 1


def test_the_driver_dies(run, cluster, undisturbed):
    """Ray keeps the room of an elastic group for three minutes after its driver was killed, so
    there is more: waiting would be all that this test does."""
    kills = deaths(3, 3)
    add_node(cluster, workers=2 * len(kills))
    for death in kills:
        run.start()
        wait_for(run, death)
        run.kill()
        print(f"killed the driver at step {run.newest_step()}, {len(all_workers(cluster))} left")
        time.sleep(death.share)
    run.finish()
    assert_same_training(run, undisturbed, STEPS)


def test_a_training_whose_driver_froze_is_followed_and_writes_no_more(run, settings):
    """The frozen driver's workers are not frozen: they are what must stop. They have long enough a
    way to go that another start takes over in the middle of it."""
    steps = 400
    alone = settings | {
        "train.num_workers": 1, "pairs.lease_seconds": 3, "train.max_train_steps": steps,
    }  # fmt: skip
    run.settings = alone
    with TrainingRun(alone, run.folder) as second:
        run.start()
        run.wait_until(lambda: run.newest_step() >= 10, "a checkpoint")
        frozen = run.process
        assert frozen is not None
        frozen.send_signal(signal.SIGSTOP)
        try:
            second.start()
            second.wait_until(lambda: newest_fence(open_store(str(run.folder))) == 2, "a lease")
            at = run.newest_step()
            assert at < steps, "nothing was left to do"
            second.finish()
        finally:
            frozen.send_signal(signal.SIGCONT)
        code = run.wait()
        story = run.log.read_text()
        print(f"taken over at step {at}; exit code {code}: {story[-400:]}")
        assert code == 4 and "has lost its lease 1 (lease 2 was taken by process" in story
        second.whole(steps)
