"""Fail at the door: has the cluster nodes for this work, and what is left for reading and writing?

Ray waits without a word for what no node can run; the words are said here.
"""

from collections.abc import Sequence

from cluster.local import cluster_address
from jobs.config import Recipe
from jobs.errors import Exit, JobError
from jobs.session import Session
from pipelines.placement import Demand, NodeFacts, living_nodes, room_for, unmet

# Beside the actors, Ray Data runs tasks of one CPU each, that read and write.
DATA_CPUS = 1.0


def pairs_demand(recipe: Recipe) -> Demand:
    section = recipe.pairs
    least = section.actors if isinstance(section.actors, int) else section.actors.min
    return Demand(
        "teachers", "pairs.cpus_per_actor, pairs.gpus_per_actor, pairs.placement", least,
        section.cpus_per_actor, section.gpus_per_actor, section.placement,
    )  # fmt: skip


def train_demand(recipe: Recipe) -> Demand:
    section = recipe.train
    least = section.group_size if isinstance(section.group_size, int) else section.group_size[0]
    return Demand(
        "training workers", "train.cpus_per_worker, train.use_gpu, train.placement", least,
        section.cpus_per_worker, float(section.use_gpu), section.placement, whole=True,
    )  # fmt: skip


def teacher_training_demand(recipe: Recipe) -> Demand:
    section = recipe.train_teacher
    return Demand(
        "training workers", "train_teacher.use_gpu, train_teacher.placement",
        section.num_workers, 1.0, float(section.use_gpu), section.placement, whole=True,
    )  # fmt: skip


def evaluate_demand(recipe: Recipe) -> Demand:
    section = recipe.evaluate
    return Demand(
        "evaluation actors",
        "evaluate.cpus_per_actor, evaluate.gpus_per_actor, evaluate.placement",
        section.actors, section.cpus_per_actor, section.gpus_per_actor, section.placement,
    )  # fmt: skip


def check_room(session: Session, demand: Demand, *, spare_cpus: float = 0.0) -> None:
    """Say, or refuse, what would wait without end. Ray must be running.

    `spare_cpus` must be left beside the actors. A cluster whose nodes are started on demand
    (`ray.autoscaling`) is only told of; an embedded Ray never gets more than it has.
    """
    import ray

    nodes = living_nodes(ray.nodes())
    why = unmet(demand, nodes) or too_full(demand, nodes, spare_cpus)
    on_demand = False if is_embedded(session.recipe) else session.recipe.ray.autoscaling
    if not why:
        room = room_for(demand, nodes)
        if room < demand.count:
            session.display.say(f"room for {room} of {demand.count} {demand.what} for now")
    elif on_demand is False:
        raise JobError(f"{why}. {_remedy(session.recipe)}", Exit.REFUSED)
    elif on_demand:
        session.display.say(f"waiting for nodes to be started: {why}")
    else:
        session.display.say(
            f"warning: {why}. This waits until such a node joins; ray.autoscaling: false refuses "
            "instead, true says that nodes are started on demand"
        )


def too_full(demand: Demand, nodes: Sequence[NodeFacts], spare_cpus: float) -> str:
    """Why the actors would leave nothing to feed them with; "": enough is left."""
    total = sum(node.resources.get("CPU", 0.0) for node in nodes)
    taken = demand.cpus * min(demand.count, room_for(demand, nodes))
    if total - taken >= spare_cpus:
        return ""
    return (
        f"{demand.what} would take {taken:g} of the {total:g} logical CPUs; reading and writing "
        f"need {spare_cpus:g} beside them and would wait for ever"
    )


def is_embedded(recipe: Recipe) -> bool:
    """Does the recipe's work start a Ray of its own?"""
    return cluster_address(recipe.ray.address) is None


def _remedy(recipe: Recipe) -> str:
    if is_embedded(recipe):
        return (
            "An embedded Ray has what ray.num_cpus says (logical CPUs, they may be more than "
            "cores); raise it, or ask for fewer or smaller actors"
        )
    return (
        "Correct these settings or add such a node; ray.autoscaling: true waits for nodes that "
        "are started on demand"
    )
