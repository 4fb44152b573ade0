"""The Kubernetes files against the parts of the schemas that they use.

RayCronJob: helm-chart/kuberay-operator/crds/ray.io_raycronjobs.yaml of KubeRay v1.7.0 (RayJob and
RayCluster specs are inlined there). CronJob: the batch/v1 API of Kubernetes 1.34. A field that is
not listed here is an error: the API server would drop it or refuse the file.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.schedule import check_expression, check_timezone
from jobs.cli import VERBS

FOLDER = Path(__file__).parent.parent.parent / "cluster" / "kuberay"

# A type; a dict of allowed fields, where "!" ends the name of a required one; a list of one kind;
# a set of allowed values.
STRINGS = {"*": str}
CONTAINER = {
    "name!": str,
    "image!": str,
    "command": [str],
    "args": [str],
    "env": [
        {"name!": str, "value": str, "valueFrom": {"secretKeyRef!": {"name!": str, "key!": str}}}
    ],
    "envFrom": [{"secretRef!": {"name!": str, "optional": bool}}],
    "resources": {"requests": STRINGS, "limits": STRINGS},
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
}
POD_TEMPLATE = {
    "spec!": {
        "containers!": [CONTAINER],
        "serviceAccountName": str,
        "automountServiceAccountToken": bool,
        "restartPolicy": {"Never", "OnFailure"},
        "tolerations": [
            {"key": str, "operator": {"Exists", "Equal"}, "value": str, "effect": {"NoSchedule"}}
        ],
        "volumes": [{"name!": str, "configMap": {"name!": str}}],
    }
}
RAY_CLUSTER_SPEC = {
    "headGroupSpec!": {"rayStartParams": STRINGS, "template!": POD_TEMPLATE, "serviceType": str},
    "rayVersion": str,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": {"v1", "v2"},
        "idleTimeoutSeconds": int,
        "upscalingMode": {"Default", "Aggressive", "Conservative"},
    },
    "authOptions": {"mode": {"disabled", "token"}, "secretName": str, "enableK8sTokenAuth": bool},
    "workerGroupSpecs": [
        {
            "groupName!": str,
            "replicas": int,
            "minReplicas!": int,
            "maxReplicas!": int,
            "rayStartParams": STRINGS,
            "template!": POD_TEMPLATE,
        }
    ],
}
RAY_CRON_JOB = {
    "apiVersion!": {"ray.io/v1"},
    "kind!": {"RayCronJob"},
    "metadata!": {"name!": str},
    "spec!": {
        "schedule!": str,
        "timeZone": str,
        "suspend": bool,
        "jobTemplate!": {
            "entrypoint": str,
            "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
            "shutdownAfterJobFinishes": bool,
            "ttlSecondsAfterFinished": int,
            "backoffLimit": int,
            "activeDeadlineSeconds": int,
            "preRunningDeadlineSeconds": int,
            "runtimeEnvYAML": str,
            "metadata": STRINGS,
            "rayClusterSpec": RAY_CLUSTER_SPEC,
        },
    },
}
CRON_JOB = {
    "apiVersion!": {"batch/v1"},
    "kind!": {"CronJob"},
    "metadata!": {"name!": str},
    "spec!": {
        "schedule!": str,
        "timeZone": str,
        "concurrencyPolicy": {"Allow", "Forbid", "Replace"},
        "startingDeadlineSeconds": int,
        "successfulJobsHistoryLimit": int,
        "failedJobsHistoryLimit": int,
        "suspend": bool,
        "jobTemplate!": {
            "spec!": {
                "backoffLimit": int,
                "ttlSecondsAfterFinished": int,
                "template!": POD_TEMPLATE,
            }
        },
    },
}
FILES = {"raycronjob-regenerate.yaml": RAY_CRON_JOB, "cronjob-regenerate.yaml": CRON_JOB}


def problems(value: Any, schema: Any, place: str = "") -> list[str]:
    """Where `value` differs from `schema`, one line each."""
    if isinstance(schema, set):
        return [] if value in schema else [f"{place}: {value!r} is not one of {schema}"]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{place}: expected a list"]
        return [
            p for i, item in enumerate(value) for p in problems(item, schema[0], f"{place}[{i}]")
        ]
    if isinstance(schema, dict):
        return _object_problems(value, schema, place)
    wrong = not isinstance(value, schema) or (schema is int and isinstance(value, bool))
    return [f"{place}: {value!r} is not {schema.__name__}"] if wrong else []


def _object_problems(value: Any, schema: dict[str, Any], place: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{place}: expected an object"]
    if "*" in schema:
        return [p for key, v in value.items() for p in problems(v, schema["*"], f"{place}.{key}")]
    kinds = {key.rstrip("!"): kind for key, kind in schema.items()}
    required = [key.rstrip("!") for key in schema if key.endswith("!")]
    found = [f"{place}.{key}: missing" for key in required if key not in value]
    for key, item in value.items():
        where = f"{place}.{key}"
        found += problems(item, kinds[key], where) if key in kinds else [f"{where}: unknown"]
    return found


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.mark.parametrize("name", list(FILES))
def test_the_file_fits_its_schema(name):
    content = read(name)
    assert problems(content, FILES[name]) == []
    check_expression(content["spec"]["schedule"])
    check_timezone(content["spec"]["timeZone"])
    assert len(content["metadata"]["name"]) <= 36  # KubeRay derives longer names from it


def test_a_wrong_field_is_noticed():
    content = read("raycronjob-regenerate.yaml")
    content["spec"]["concurrencyPolicy"] = "Forbid"  # a CronJob has it, a RayCronJob does not
    content["spec"]["jobTemplate"]["backoffLimit"] = "2"
    del content["spec"]["jobTemplate"]["rayClusterSpec"]["headGroupSpec"]["template"]
    assert [line.split(":")[0] for line in problems(content, RAY_CRON_JOB)] == [
        ".spec.jobTemplate.backoffLimit",
        ".spec.jobTemplate.rayClusterSpec.headGroupSpec.template",
        ".spec.concurrencyPolicy",
    ]


def test_both_run_the_verb_regenerate():
    ray_job = read("raycronjob-regenerate.yaml")["spec"]["jobTemplate"]
    (container,) = read("cronjob-regenerate.yaml")["spec"]["jobTemplate"]["spec"]["template"][
        "spec"
    ]["containers"]
    commands = [ray_job["entrypoint"].split(), container["args"][1:]]
    assert container["command"] == ["ray", "job", "submit"] and container["args"][0] == "--"
    for command in commands:
        assert command[:2] == ["python", "-m"]
        assert command[2].removeprefix("jobs.") in VERBS and command[2] == "jobs.regenerate"


def test_no_credential_stands_in_a_file():
    """Values come from a Secret or a role; only names of Secrets are written down."""
    for name in FILES:
        for container in _containers(read(name)):
            for variable in container.get("env", []):
                secret = any(word in variable["name"] for word in ("KEY", "SECRET", "TOKEN"))
                assert ("value" not in variable) or not secret, variable["name"]


def test_ray_and_the_pinned_version_agree():
    import ray

    spec = read("raycronjob-regenerate.yaml")["spec"]["jobTemplate"]["rayClusterSpec"]
    assert spec["rayVersion"].rsplit(".", 1)[0] == ray.__version__.rsplit(".", 1)[0]
    images = {container["image"] for name in FILES for container in _containers(read(name))}
    assert len(images) == 1


def _containers(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [found for item in value for found in _containers(item)]
    if not isinstance(value, dict):
        return []
    own = value.get("containers", [])
    return [
        *own,
        *(f for key, item in value.items() if key != "containers" for f in _containers(item)),
    ]
