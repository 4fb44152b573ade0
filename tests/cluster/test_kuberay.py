"""The Kubernetes files: every field is one that KubeRay and Kubernetes know, and they fit together.

Where a KubeRay checkout is at hand, also against its own definitions:
`KUBERAY_CRDS=<checkout>/helm-chart/kuberay-operator/crds pytest tests/cluster/test_kuberay.py`.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cluster.schedule import check_expression, check_timezone
from cluster.secrets import names_secret, refuse_secrets
from jobs.cli import VERBS, _options
from tests.cluster import kubernetes_schemas as schemas
from tests.cluster.pools import check_pools

ROOT = schemas.ROOT
FOLDER = ROOT / "cluster" / "kuberay"
FILES = {path.name: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}
OURS = {name: content for name, content in FILES.items() if content["kind"] != "CronJob"}
CLUSTER = FILES["raycluster.yaml"]
RAY_JOBS = {
    name: content["spec"].get("jobTemplate", content["spec"])
    for name, content in OURS.items()
    if content["kind"] != "RayCluster"
}
# Maps whose keys are the user's: a misspelt one is no mistake that a schema can find.
FREE = {"labels", "rayStartParams", "clusterSelector", "nodeSelector", "requests", "limits"}
FREE |= {"resources"}  # of a group; that of a container is checked through what is in it

# The pipeline's job has the fields of the nightly job and the cluster of raycluster.yaml (below).
BROKEN = [name for name in FILES if name != "rayjob-pipeline.yaml"]

LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36, "CronJob": 52}
OBJECT_STORE_SHARE = 0.3  # of a node's memory, as Ray takes it


def test_there_is_a_cluster_a_job_for_each_long_verb_and_two_schedules():
    assert set(FILES) == {
        "cronjob-regenerate.yaml",
        "raycluster.yaml",
        "raycronjob-regenerate.yaml",
        *(
            f"rayjob-{verb}.yaml"
            for verb in ("pairs", "regenerate", "train", "evaluate", "pipeline")
        ),
    }


@pytest.mark.parametrize("name", list(FILES))
def test_the_file_fits_its_schema(name):
    content = FILES[name]
    assert schemas.problems(content) == []
    identity = content["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", identity)
    assert len(identity) <= LONGEST_NAME[content["kind"]]  # longer names are derived from it


@pytest.mark.parametrize("path", [FOLDER / "rayjob-pipeline.yaml", ROOT / "docs" / "cluster.md"])
def test_the_pipelines_log_is_asked_for_when_there_is_one(path):
    """Its job comes when its cluster is ready, and its pod after that."""
    steps = (
        "apply -f cluster/kuberay/rayjob-pipeline",
        "wait --for=create",
        "ready}'=1",
        "logs -f",
    )
    text = path.read_text()
    places = [text.index(step) for step in steps]
    assert places == sorted(places)


@pytest.mark.parametrize("name", BROKEN)
def test_a_misspelt_field_is_noticed_wherever_it_stands(name):
    content = FILES[name]
    places = [place for place, value in _walk(content) if _is_closed(place, value)]
    assert len(places) >= 3
    for place in places:
        broken = copy.deepcopy(content)
        _at(broken, place)["misspelt"] = "1"
        assert any("misspelt" in line for line in schemas.problems(broken)), place


@pytest.mark.parametrize("name", BROKEN)
def test_a_value_of_a_wrong_type_is_noticed_wherever_it_stands(name):
    content = FILES[name]
    leaves = [place for place, value in _walk(content) if not isinstance(value, (dict, list))]
    places = [place for place in leaves if place != ("kind",)]  # what the schema is chosen by
    for place in places:
        broken = copy.deepcopy(content)
        _at(broken, place[:-1])[place[-1]] = {"no": ["such", "type"]}
        assert schemas.problems(broken), place


def test_a_missing_field_is_noticed():
    for place in (["metadata", "name"], ["spec", "headGroupSpec", "template"]):
        broken = copy.deepcopy(CLUSTER)
        del _at(broken, place[:-1])[place[-1]]
        assert any("required property" in line for line in schemas.problems(broken)), place


@pytest.mark.parametrize("name", [name for name in FILES if "schedule" in FILES[name]["spec"]])
def test_a_schedule_can_be_read(name):
    check_expression(FILES[name]["spec"]["schedule"])
    check_timezone(FILES[name]["spec"]["timeZone"])


@pytest.mark.parametrize("name", [*RAY_JOBS, "cronjob-regenerate.yaml"])
def test_the_command_is_one_of_the_verbs_with_arguments_that_it_takes(name):
    if name in RAY_JOBS:
        command = RAY_JOBS[name]["entrypoint"].split()
    else:
        (container,) = _containers(FILES[name])
        assert container["command"] == ["ray", "job", "submit"]
        dashes, *command = container["args"]
        assert dashes == "--"
    assert command[:2] == ["python", "-m"]
    verb = command[2].removeprefix("jobs.")
    assert command[2] == f"jobs.{verb}" and verb in VERBS and verb in name
    options = _options([verb, *command[3:]])
    assert options.config in _recipe_files(CLUSTER["spec"]["headGroupSpec"]["template"]["spec"])


def test_jobs_find_the_cluster_and_its_token():
    cluster = CLUSTER["metadata"]["name"]
    for spec in RAY_JOBS.values():
        if "clusterSelector" in spec:
            assert spec["clusterSelector"] == {"ray.io/cluster": cluster}
            # The operator refuses these for a cluster that it did not make for the job.
            assert not spec.keys() & {"rayClusterSpec", "backoffLimit", "ttlSecondsAfterFinished"}
        else:
            assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    (container,) = _containers(FILES["cronjob-regenerate.yaml"])
    variables = {v["name"]: v.get("value", v.get("valueFrom")) for v in container["env"]}
    assert variables["RAY_API_SERVER_ADDRESS"] == f"http://{cluster}-head-svc:8265"
    assert variables["RAY_AUTH_MODE"] == "token"
    assert variables["RAY_AUTH_TOKEN"] == {"secretKeyRef": {"name": cluster, "key": "auth_token"}}


def test_clusters_that_jobs_bring_along_are_the_one_of_raycluster():
    whole = CLUSTER["spec"]
    assert RAY_JOBS["rayjob-pipeline.yaml"]["rayClusterSpec"] == whole
    nightly = RAY_JOBS["raycronjob-regenerate.yaml"]["rayClusterSpec"]
    without = [group for group in whole["workerGroupSpecs"] if group["groupName"] != "trainer"]
    assert nightly == {**whole, "workerGroupSpecs": without}


def test_the_autoscaler_finds_in_the_groups_what_the_recipe_asks_for():
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    whole = copy.deepcopy(CLUSTER)
    whole["metadata"]["namespace"] = "default"  # the API server's
    node_types = _derive_autoscaling_config_from_ray_cr(whole)["available_node_types"]
    head = node_types.pop("headgroup")
    assert head["resources"]["CPU"] == 0 and head["max_workers"] == 0
    check_pools(node_types)


def test_the_operator_accepts_the_groups():
    """Rules that KubeRay has beside its schema."""
    spec = CLUSTER["spec"]
    assert spec["authOptions"] == {"mode": "token"} and spec["autoscalerOptions"]["version"] == "v2"
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        params = group["rayStartParams"]
        assert "labels" not in params  # the field of the group is the place
        assert not (group.get("resources") and params.keys() & {"num-cpus", "num-gpus", "memory"})
        assert "restartPolicy" not in group["template"]["spec"]  # Never, set by the operator
    for group in spec["workerGroupSpecs"]:
        assert 0 == group["minReplicas"] == group["replicas"] < group["maxReplicas"]


def test_pods_are_confined_and_have_what_they_need():
    assert len(list(_pods())) == 1 + 4 + 4 + 3
    for pod in _pods():
        assert (
            pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        )
        (container,) = pod["containers"]
        confined = container["securityContext"]
        assert confined["allowPrivilegeEscalation"] is False
        assert confined["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert not container.keys() & {"livenessProbe", "readinessProbe"}  # the operator's
        if container["name"] != "ray-head":
            assert pod["automountServiceAccountToken"] is False
        if container["name"] != "submit":
            _check_shared_memory(pod, container)


def test_only_gpu_pods_wait_on_gpu_nodes():
    for group in CLUSTER["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        gpus = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        tolerated = {toleration["key"] for toleration in pod["tolerations"]}
        assert gpus == ("nvidia.com/gpu" in tolerated) == ("nodeSelector" in pod)
        assert ("spot" in tolerated) == (group["groupName"] != "trainer")


def test_no_credential_stands_in_a_file():
    """Values come from a Secret or a role; only names of Secrets are written down."""
    for content in FILES.values():
        refuse_secrets(content)
        for container in _containers(content):
            for variable in container.get("env", []):
                assert "value" not in variable or not names_secret(variable["name"]), variable


def test_image_and_versions_agree_with_the_project():
    project = re.search(r'^version = "(.+)"', (schemas.ROOT / "pyproject.toml").read_text(), re.M)
    pinned = re.search(r"^ray==(.+)$", (schemas.ROOT / "constraints.txt").read_text(), re.M)
    assert project and pinned
    images = {
        container["image"] for content in FILES.values() for container in _containers(content)
    }
    assert images == {f"registry.example.com/one-step-dmd:{project[1]}"}
    assert CLUSTER["spec"]["rayVersion"] == pinned[1]


# ---------------------------------------------------------------------------- KubeRay's definitions

with_crds = pytest.mark.skipif(schemas.CRDS is None, reason="KUBERAY_CRDS names no folder")


@with_crds
def test_the_files_fit_kuberays_own_definitions():
    for name, content in OURS.items():
        assert schemas.crd_problems(content) == [], name
        broken = copy.deepcopy(content)
        broken["spec"]["misspelt"] = 1
        assert schemas.crd_problems(broken), name


@with_crds
def test_our_schema_says_what_kuberay_says():
    ours = schemas.kuberay_schema()["$defs"]
    for kind in ("RayCluster", "RayJob", "RayCronJob"):
        theirs = schemas.crd(kind)["properties"]["spec"]
        assert list(_differences(ours[f"{kind}Spec"], theirs)) == []


def _differences(ours: Any, theirs: Any, place: str = "") -> Iterator[str]:
    """Where our schema allows or demands something else; fields that ours leaves out are fine."""
    reference = ours.get("$ref", "")
    if "_definitions.json" in reference:  # Kubernetes' own: not ours to compare
        return
    if reference:
        ours = schemas.kuberay_schema()["$defs"][reference.rsplit("/", 1)[1]]
    for key in ("type", "enum", "required", "minimum"):
        if ours.get(key) != theirs.get(key) and not place.endswith(".submissionMode"):
            yield f"{place}: {key} is {theirs.get(key)}, not {ours.get(key)}"
    for name, part in ours.get("properties", {}).items():
        if name not in theirs.get("properties", {}):
            yield f"{place}.{name}: unknown to KubeRay"
        else:
            yield from _differences(part, theirs["properties"][name], f"{place}.{name}")
    if "items" in ours:
        yield from _differences(ours["items"], theirs["items"], f"{place}[]")


# --------------------------------------------------------------------------------------- helpers


def _walk(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value of a file with the keys that lead to it, the file itself first."""
    yield place, value
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _walk(part, (*place, key))


def _is_closed(place: tuple[Any, ...], value: Any) -> bool:
    return isinstance(value, dict) and (not place or place[-1] not in FREE)


def _at(content: Any, place: Any) -> Any:
    for key in place:
        content = content[key]
    return content


def _containers(value: Any) -> list[dict[str, Any]]:
    return [
        container
        for place, part in _walk(value)
        if place and place[-1] == "containers"
        for container in part
    ]


def _pods() -> Iterator[dict[str, Any]]:
    for content in FILES.values():
        yield from (p for _, p in _walk(content) if isinstance(p, dict) and "containers" in p)


def _recipe_files(pod: dict[str, Any]) -> set[str]:
    """Where a ConfigMap with the key recipe.yaml appears in the head's container."""
    maps = {volume["name"] for volume in pod["volumes"] if "configMap" in volume}
    mounts = pod["containers"][0]["volumeMounts"]
    return {f"{m['mountPath']}/recipe.yaml" for m in mounts if m["name"] in maps}


def _check_shared_memory(pod: dict[str, Any], container: dict[str, Any]) -> None:
    """The object store fits into /dev/shm, and /dev/shm into the memory that it counts to."""
    (volume,) = (v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm")
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert volume["medium"] == "Memory"
    shared, memory = (
        int(size.removesuffix("Gi"))
        for size in (volume["sizeLimit"], container["resources"]["limits"]["memory"])
    )
    assert OBJECT_STORE_SHARE * memory <= shared < memory / 2
