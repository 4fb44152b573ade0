"""On which nodes of a cluster work runs, and whether a cluster has such nodes.

A demand that no node can meet is not refused by Ray: it waits, for an autoscaler may bring such a
node. Whoever starts work asks `fitting` first, so that a misspelt label is a message and not a
wait without end.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, field_validator

from pipelines.section import Section

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
ACCELERATOR = "accelerator_type:"  # Ray's prefix of the resource that a node of a type has
# As Ray reads it: value, !value, in(a, b), !in(a, b).
_SELECTOR = re.compile(r"(?P<no>!?)(?:in\((?P<many>[^()!]+)\)|(?P<one>[\w.-]*))")


class PlacementSection(Section):
    """Which nodes may do a kind of work; without settings, any."""

    accelerator_type: str | None = Field(
        default=None,
        pattern=r"^[\w.-]+$",
        description="Ray's name of the GPU, as `ray status -v` and the dashboard show it: A10G, "
        "A100, H100, …",
    )
    label_selector: dict[str, str] = Field(
        default_factory=dict,
        description="labels of the node: {pool: teacher}; also !value, in(a, b) and !in(a, b)",
    )

    @field_validator("label_selector")
    @classmethod
    def _readable(cls, selector: dict[str, str]) -> dict[str, str]:
        for key, value in selector.items():
            if not _SELECTOR.fullmatch(value):
                raise ValueError(
                    f"{key}: {value!r} is no selector; expected value, !value, in(a, b) or "
                    "!in(a, b)"
                )
        return selector

    def options(self) -> dict[str, Any]:
        """As `ray.remote`, `map_batches` and `ScalingConfig` take it; what is not set stays out."""
        found: dict[str, Any] = {}
        if self.accelerator_type is not None:
            found["accelerator_type"] = self.accelerator_type
        if self.label_selector:
            found["label_selector"] = dict(self.label_selector)
        return found


class GroupPlacementSection(PlacementSection):
    """Of a group of training workers, that is started as a whole."""

    strategy: Strategy = Field(
        default="PACK",
        description="of the workers: on as few nodes as possible, where gradients travel least; "
        "SPREAD: on as many; STRICT_…: not at all otherwise",
    )

    def options(self) -> dict[str, Any]:
        return super().options() | {"placement_strategy": self.strategy}


@dataclass(frozen=True)
class Demand:
    """`count` actors or workers with so many logical CPUs and GPUs each; `whole`: all of them or
    none. `key`: the recipe's settings that say where, such as "pairs.placement"."""

    what: str
    key: str
    count: int
    cpus: float
    gpus: float
    placement: PlacementSection = field(default_factory=PlacementSection)
    whole: bool = False

    def in_words(self) -> str:
        parts = [f"{self.cpus:g} CPUs"]
        if self.gpus:
            parts.append(f"{self.gpus:g} GPUs")
        if self.placement.accelerator_type:
            parts.append(f"accelerator_type {self.placement.accelerator_type}")
        parts += [f"label {key}={value}" for key, value in self.placement.label_selector.items()]
        return ", ".join(parts)


@dataclass(frozen=True)
class NodeFacts:
    """A living node: all that it has, used or not."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]


def living_nodes(nodes: Iterable[Mapping[str, Any]]) -> list[NodeFacts]:
    """From `ray.nodes()`."""
    return [NodeFacts(n["Resources"], n.get("Labels") or {}) for n in nodes if n["Alive"]]


def room_for(demand: Demand, nodes: Iterable[NodeFacts]) -> int:
    """For how many of the demand's actors the cluster has room while nothing else runs."""
    return sum(_room_on(demand, node) for node in nodes if _may_run(demand.placement, node))


def unmet(demand: Demand, nodes: Iterable[NodeFacts]) -> str:
    """Why work could not begin, for even one actor (of a `whole` group: all) has no room; "": it
    could."""
    nodes = list(nodes)
    room = room_for(demand, nodes)
    if room >= (demand.count if demand.whole else 1):
        return ""
    if room:
        return (
            f"the cluster has room for {room} of {demand.count} {demand.what} "
            f"({demand.in_words()} each; see {demand.key})"
        )
    allowed = [node for node in nodes if _may_run(demand.placement, node)]
    if allowed:
        most = {
            name: max(node.resources.get(name, 0.0) for node in allowed) for name in ("CPU", "GPU")
        }
        has = (
            f"the largest of {len(allowed)} nodes that may has {most['CPU']:g} CPUs and "
            f"{most['GPU']:g} GPUs"
        )
    else:
        has = f"the cluster has {_listed(nodes)}"
    return f"no node can run {demand.what} ({demand.in_words()}; see {demand.key}): {has}"


def _room_on(demand: Demand, node: NodeFacts) -> int:
    asked = {"CPU": demand.cpus, "GPU": demand.gpus}
    room = [
        math.floor(node.resources.get(name, 0.0) / amount + 1e-9)
        for name, amount in asked.items()
        if amount > 0
    ]
    return min(room, default=demand.count)


def _may_run(placement: PlacementSection, node: NodeFacts) -> bool:
    kind = placement.accelerator_type
    if kind is not None and not node.resources.get(f"{ACCELERATOR}{kind}"):
        return False
    return all(
        _matches(value, node.labels.get(key)) for key, value in placement.label_selector.items()
    )


def _matches(selector: str, label: str | None) -> bool:
    """Of a node without the label, only what is forbidden holds."""
    found = _SELECTOR.fullmatch(selector)
    if found is None:
        return False
    many = found["many"]
    values = [found["one"]] if many is None else [value.strip() for value in many.split(",")]
    return (label in values) != bool(found["no"])


def _listed(nodes: Iterable[NodeFacts]) -> str:
    """The kinds of GPU and the labels that there are, in few words."""
    nodes = list(nodes)
    kinds = {
        name.removeprefix(ACCELERATOR)
        for node in nodes
        for name in node.resources
        if name.startswith(ACCELERATOR)
    }
    labels = {
        f"{key}={value}"
        for node in nodes
        for key, value in node.labels.items()
        if not key.startswith("ray.io/")
    }
    return (
        f"{len(nodes)} nodes, accelerator types {', '.join(sorted(kinds)) or 'none'}, labels "
        f"{', '.join(sorted(labels)) or 'none'}"
    )
