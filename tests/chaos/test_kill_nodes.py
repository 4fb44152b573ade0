"""Teachers and a whole node die under a run of several nodes; it completes by itself."""

import time
from collections.abc import Iterator

import psutil
import pytest

from tests.chaos.driver import Driver
from tests.chaos.whole import assert_whole, landed_table_ids, stored_ids

PROMPTS, BLOCK = 64, 8


@pytest.fixture
def cluster() -> Iterator[object]:
    """A head without CPUs for teachers, which is the driver's node, and two nodes that work."""
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 128 << 20},
    )
    yield found
    found.shutdown()


def teachers(node) -> list[psutil.Process]:
    """The node's workers that hold a teacher: below its raylet, with the actor in their title."""
    raylet, found = node.all_processes["raylet"][0].process.pid, []
    for process in psutil.process_iter():
        try:
            ancestors = [parent.pid for parent in process.parents()]
            if "TeacherActor" in " ".join(process.cmdline()) and raylet in ancestors:
                found.append(process)
        except psutil.Error:  # of another user, or gone
            continue
    return found


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_run_survives_the_death_of_teachers_and_of_a_node(cluster, tiny_teacher_dir, tmp_path):
    nodes = [cluster.add_node(num_cpus=3, object_store_memory=128 << 20) for _ in range(2)]
    cluster.wait_for_nodes()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {index}" for index in range(PROMPTS)))
    settings = {
        "run.dir": tmp_path / "run", "teacher.path": tiny_teacher_dir, "pairs.prompts": prompts,
        "pairs.rows_per_block": BLOCK, "pairs.steps": 500, "pairs.actors": 2,
        "ray.address": cluster.address,
    }  # fmt: skip
    with Driver(settings, tmp_path / "set", tmp_path / "driver.log") as driver:
        driver.start()
        assert driver.wait_until(lambda: driver.committed_rows() >= BLOCK)
        victims = [process for node in nodes for process in teachers(node)]
        assert victims, "no teacher was found"
        victims[0].kill()
        before = driver.committed_rows()
        print(f"killed 1 of {len(victims)} teachers after {before} rows")
        assert driver.wait_until(lambda: driver.committed_rows() >= before + 2 * BLOCK)
        lost = next(node for node in nodes if teachers(node))
        started = time.monotonic()
        cluster.remove_node(lost, allow_graceful=False)
        before = driver.committed_rows()
        print(f"killed a node after {before} rows, in {time.monotonic() - started:.1f} s")
        assert before < PROMPTS, "nothing was left to do"
        code, _ = driver.wait()
        assert code == 0, driver.log.read_text()[-3000:]
        newest = assert_whole(driver.root, PROMPTS)
        assert newest["version"] == 1 and newest["rejected_ids"] == []
        assert stored_ids(driver.root, newest) == landed_table_ids(
            driver.root, newest["prompts_digest"]
        )
