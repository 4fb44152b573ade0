"""What the pools of a cluster file give, against what the recipe for clusters asks for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.config import Recipe, load_recipe
from jobs.placement import evaluate_demand, pairs_demand, train_demand
from pipelines.placement import Demand, NodeFacts, room_for

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "cluster" / "recipe.yaml"


def recipe() -> Recipe:
    return load_recipe(str(RECIPE), [])


def most_demanded(recipe: Recipe) -> list[Demand]:
    """The largest pool of teachers, the largest group of training workers, all evaluators."""
    workers = recipe.train.num_workers
    most = workers if isinstance(workers, int) else workers.max
    return [
        replace(pairs_demand(recipe), count=recipe.pairs.most_actors),
        replace(train_demand(recipe), count=most),
        evaluate_demand(recipe),
    ]


def room(demand: Demand, node_types: dict[str, Any]) -> int:
    """How many the pools can run when each has all the nodes that it may have."""
    nodes = [
        NodeFacts(node_type["resources"], node_type.get("labels") or {})
        for node_type in node_types.values()
        for _ in range(node_type["max_workers"])
    ]
    return room_for(demand, nodes)


def check_pools(node_types: dict[str, Any]) -> None:
    """The head is free of work; every demand finds room, and only in its own pool."""
    asked = recipe()
    assert asked.ray.autoscaling  # else the first job of an empty cluster would be refused
    for demand in most_demanded(asked):
        assert room(demand, node_types) >= demand.count, demand
        pool = demand.placement.label_selector["pool"]
        others = {name: kind for name, kind in node_types.items() if name != pool}
        assert room(demand, others) == 0, demand
    teacher, trainer, data = (node_types[name] for name in ("teacher", "trainer", "data"))
    assert {node_type["min_workers"] for node_type in (teacher, trainer, data)} == {0}
    assert teacher["resources"]["accelerator_type:L4"] == 1
    assert trainer["resources"]["accelerator_type:L40S"] == 1
    assert "GPU" not in data["resources"] and data["resources"]["CPU"] > 0
