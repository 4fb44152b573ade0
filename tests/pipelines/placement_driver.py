"""A cluster of logical GPUs and labels, and where verbs put their work on it. Prints one JSON line.

In a process of its own: the tests' process has a Ray already. The head has no CPUs.
"""

import json
import os
import sys

import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from jobs.cli import main


def drive(folder: str, teacher: str) -> dict:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    a10g = {"accelerator_type:A10G": 1}
    teachers = cluster.add_node(num_cpus=4, num_gpus=1, labels={"pool": "teacher"}, resources=a10g)
    trainers = cluster.add_node(num_cpus=4, labels={"pool": "train"})
    cluster.wait_for_nodes()
    assert cluster.head_node is not None
    names = {
        node.node_id: name
        for name, node in (
            ("head", cluster.head_node), ("teachers", teachers), ("trainers", trainers),
        )
    }  # fmt: skip
    common = {
        "run.dir": f"{folder}/run", "teacher.path": teacher, "ray.address": cluster.address,
        "pairs.prompts": f"{folder}/prompts.txt", "ray.autoscaling": "false",
    }  # fmt: skip
    on_gpu = {
        "pairs.gpus_per_actor": 0.5, "pairs.actors": 2,
        "pairs.placement": "{accelerator_type: A10G, label_selector: {pool: teacher}}",
    }  # fmt: skip
    codes = {
        "misspelt": _run("pairs", common | {"pairs.placement": "{label_selector: {pool: techer}}"}),
        "no such GPU": _run("pairs", common | {"pairs.placement": "{accelerator_type: H100}"}),
        "pairs": _run("pairs", common | on_gpu),
        "train": _run(
            "train",
            common | {
                "train.num_workers": 2, "train.max_train_steps": 2,
                "train.placement": "{label_selector: {pool: train}}",
            },
        ),
    }  # fmt: skip
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    placed: dict[str, list[str]] = {}
    for actor in actors().values():
        where = names.get(actor["Address"]["NodeID"], "?")
        placed.setdefault(actor["ActorClassName"], []).append(where)
    ray.shutdown()
    cluster.shutdown()
    return {"codes": codes, "placed": placed}


def _run(verb: str, settings: dict[str, object]) -> int:
    chosen = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return main([verb, "--config", "tiny", *chosen])


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    print(json.dumps(drive(*sys.argv[1:])), flush=True)
