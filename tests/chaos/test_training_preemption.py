"""A node is announced to be taken away: what is done so far is saved before it goes."""

import time

import pytest

from tests.chaos.training_run import (
    TrainingRun,
    announce_preemption,
    chaos_settings,
    small_cluster,
    train_workers,
)

STEPS = 300  # workers ask every five seconds: enough of them for that
NOTICE_S = 30


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_notice_of_preemption_is_answered_with_a_checkpoint_at_once(tiny_teacher_dir, tmp_path):
    with small_cluster(2) as cluster:
        settings = chaos_settings(cluster, tiny_teacher_dir, tmp_path, steps=STEPS)
        settings |= {"train.checkpointing_steps": 10_000}
        with TrainingRun(settings, tmp_path / "run") as run:
            run.start()
            run.wait_until(lambda: bool(run.lines()), "a line of metrics")
            assert run.newest_step() == 0
            (node,) = [each for each in cluster.worker_nodes if train_workers(each)][:1]
            started = time.monotonic()
            announce_preemption(cluster, node, NOTICE_S)
            run.wait_until(lambda: run.newest_step() > 0, "a checkpoint")
            saved, took = run.newest_step(), time.monotonic() - started
            print(f"step {saved} was saved {took:.1f} s after the notice")
            assert took < NOTICE_S / 2 and saved < STEPS
            cluster.remove_node(node, allow_graceful=False)
            run.finish()
            run.whole(STEPS)
            assert run.committed_steps() == [saved, STEPS]
