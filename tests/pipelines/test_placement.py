"""Where work may run: what a cluster of given nodes has room for, and what it is told to Ray."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from cluster.local import cluster_address
from jobs.config import load_recipe
from jobs.errors import Exit, JobError
from jobs.placement import check_room, pairs_demand, too_full
from pipelines.config import EvaluateSection, PairsSection
from pipelines.images import SamplerPool
from pipelines.placement import (
    Demand,
    GroupPlacementSection,
    NodeFacts,
    PlacementSection,
    living_nodes,
    room_for,
    unmet,
)

HEAD = NodeFacts({"node:__internal_head__": 1.0, "GPU": 0.0}, {"ray.io/node-id": "a"})
SPOT = NodeFacts(
    {"CPU": 4.0, "GPU": 1.0, "accelerator_type:A10G": 1.0}, {"pool": "teacher", "market": "spot"}
)
BIG = NodeFacts({"CPU": 32.0, "GPU": 8.0, "accelerator_type:H100": 1.0}, {"pool": "train"})
NODES = (HEAD, SPOT, BIG)


def demand(count=1, cpus=1.0, gpus=0.0, *, whole=False, **placement) -> Demand:
    section = PlacementSection(**placement)
    return Demand("teachers", "pairs.placement", count, cpus, gpus, section, whole)


@pytest.mark.parametrize(
    ("asked", "room"),
    [
        (demand(), 36),
        (demand(gpus=1), 9),
        (demand(gpus=0.5), 18),
        (demand(gpus=0.5, accelerator_type="A10G"), 2),
        (demand(cpus=0, gpus=0.25, accelerator_type="A10G"), 4),
        (demand(gpus=1, accelerator_type="V100"), 0),
        (demand(label_selector={"pool": "teacher"}), 4),
        (demand(label_selector={"pool": "!teacher"}), 32),
        (demand(label_selector={"pool": "in(train, data)"}), 32),
        (demand(label_selector={"pool": "!in(train, teacher)"}), 0),
        (demand(label_selector={"market": "spot", "pool": "train"}), 0),
        (demand(cpus=33), 0),
        (demand(cpus=0), 3),
    ],
)
def test_room_is_counted_on_the_nodes_that_may(asked, room):
    assert room_for(asked, NODES) == room
    assert (unmet(asked, NODES) == "") == (room > 0)


def test_what_no_node_can_run_says_what_there_is():
    why = unmet(demand(gpus=1, accelerator_type="A100"), NODES)
    assert "accelerator_type A100" in why and "A10G, H100" in why and "pairs.placement" in why
    why = unmet(demand(label_selector={"pool": "teachr"}), NODES)
    assert "label pool=teachr" in why and "pool=teacher" in why and "ray.io" not in why
    why = unmet(demand(gpus=2, accelerator_type="A10G"), NODES)
    assert "the largest of 1 nodes" in why and "1 GPUs" in why


def test_a_group_is_placed_as_a_whole_or_not_at_all():
    alone = demand(count=10, gpus=1)
    assert unmet(alone, NODES) == ""
    group = demand(count=10, gpus=1, whole=True)
    assert "room for 9 of 10" in unmet(group, NODES)
    assert unmet(demand(count=9, gpus=1, whole=True), NODES) == ""


def test_dead_nodes_are_no_room():
    nodes = [
        {"Alive": False, "Resources": {"CPU": 64.0}, "Labels": {}},
        {"Alive": True, "Resources": {"CPU": 2.0}, "Labels": None},
    ]
    assert room_for(demand(), living_nodes(nodes)) == 2


def test_teachers_that_take_every_cpu_leave_nothing_to_read_with():
    two = [NodeFacts({"CPU": 2.0}, {})]
    assert "need 1 beside them" in too_full(demand(count=2), two, 1.0)
    assert too_full(demand(count=1), two, 1.0) == ""
    assert "take 2 of the 2" in too_full(demand(count=5), two, 1.0)  # as many as there is room for
    assert too_full(demand(count=2, cpus=0.5), two, 1.0) == ""
    assert too_full(demand(count=2), two, 0.0) == ""


@pytest.mark.parametrize("value", ["in()", "in(a", "a b", "!!a", "in(a, !b)"])
def test_a_selector_that_ray_would_not_read_is_refused(value):
    with pytest.raises(ValidationError, match=r"no selector.*expected value"):
        PlacementSection(label_selector={"pool": value})


def test_only_what_is_set_is_told_to_ray():
    assert PlacementSection().options() == {}
    assert GroupPlacementSection().options() == {"placement_strategy": "PACK"}
    section = GroupPlacementSection(
        accelerator_type="A10G", label_selector={"pool": "train"}, strategy="SPREAD"
    )
    assert section.options() == {
        "accelerator_type": "A10G", "label_selector": {"pool": "train"},
        "placement_strategy": "SPREAD",
    }  # fmt: skip


def test_selectors_are_what_ray_itself_accepts():
    """Ray refuses the same values, so that no recipe passes here and fails there."""
    from ray._private.label_utils import validate_label_selector_value

    for value in ("spot", "!spot", "in(a, b)", "!in(a, b)", "a-1.b_c"):
        assert validate_label_selector_value(value) is None
        PlacementSection(label_selector={"pool": value})
    for value in ("in()", "in(a", "a b", "!!a"):
        assert validate_label_selector_value(value)


def test_evaluation_actors_are_placed_by_their_own_keys():
    section = EvaluateSection(
        actors=3, cpus_per_actor=2, gpus_per_actor=0.5,
        placement=PlacementSection(accelerator_type="L4"),
    )  # fmt: skip
    assert SamplerPool.of(section) == SamplerPool(3, 2, 0.5, {"accelerator_type": "L4"})
    assert PairsSection().placement.options() == {}


@pytest.fixture
def at_the_door(monkeypatch):
    """What is said of a teacher on an A100, on a cluster without one; raises where refused."""
    import ray

    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}, "Labels": {}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def ask(*settings: str) -> list[str]:
        said: list[str] = []
        recipe = load_recipe("tiny", ["pairs.placement.accelerator_type=A100", *settings])
        session = SimpleNamespace(recipe=recipe, display=SimpleNamespace(say=said.append))
        check_room(session, pairs_demand(recipe), spare_cpus=1.0)  # type: ignore[arg-type]
        return said

    return ask


def test_what_cannot_be_placed_is_refused_or_said_but_never_silent(at_the_door):
    with pytest.raises(JobError, match=r"accelerator_type A100.*ray\.num_cpus") as refused:
        at_the_door()  # an embedded Ray has what it has
    assert refused.value.code == Exit.REFUSED
    with pytest.raises(JobError, match=r"no node can run teachers.*ray\.autoscaling: true"):
        at_the_door("ray.address=head:6379", "ray.autoscaling=false")
    (warning,) = at_the_door("ray.address=head:6379")
    assert warning.startswith("warning: no node can run teachers") and "ray.autoscaling" in warning
    (told,) = at_the_door("ray.address=head:6379", "ray.autoscaling=true")
    assert told.startswith("waiting for nodes to be started")


def test_fewer_actors_than_asked_for_are_said(at_the_door):
    plain = "pairs.placement.accelerator_type=null"
    assert at_the_door(plain, "pairs.actors=2") == []
    half = at_the_door(plain, "pairs.actors=6", "pairs.cpus_per_actor=0.5")
    assert half == []
    (told,) = at_the_door(plain, "pairs.actors=2", "pairs.cpus_per_actor=3")
    assert told == "room for 1 of 2 teachers for now"
    with pytest.raises(JobError, match="would take 4 of the 4 logical CPUs"):
        at_the_door(plain, "pairs.actors=4")


@pytest.mark.cluster
def test_work_goes_where_the_recipe_says_and_the_head_has_none(tiny_teacher_dir, tmp_path):
    """Two half-GPU teachers on the labelled node with the A10G, the training on the other one."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {index}" for index in range(16)))
    driver = [sys.executable, "-m", "tests.pipelines.placement_driver"]
    done = subprocess.run(
        [*driver, str(tmp_path), tiny_teacher_dir],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["codes"] == {
        "misspelt": Exit.REFUSED, "no such GPU": Exit.REFUSED, "pairs": 0, "train": 0,
    }  # fmt: skip
    assert "label pool=techer" in done.stderr and "accelerator_type H100" in done.stderr
    placed = found["placed"]
    (teachers,) = (nodes for name, nodes in placed.items() if "TeacherActor" in name)
    assert teachers == ["teachers", "teachers"]
    assert placed["RayTrainWorker"] == ["trainers", "trainers"]


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (None, None, None),
        (None, "", None),
        (None, "http://head:8265", None),  # for `dmd submit`
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", "10.0.0.1:6379", "auto"),
        ("http://head:8265", None, "http://head:8265"),  # nobody's embedded Ray, whoever asks
    ],
)
def test_a_job_server_is_no_cluster_to_connect_to(monkeypatch, given, environment, expected):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    assert cluster_address(given) == expected
