"""Schemas of the Kubernetes files: Kubernetes' own, ours for KubeRay, KubeRay's CRDs if at hand.

All are strict: a field that a schema does not know is a mistake, which the API server would drop
without a word.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

ROOT = Path(__file__).parent.parent.parent
KUBERAY_VERSION = "1.7.0"
KUBERNETES_VERSION = "1.34.0"  # the oldest that is still maintained
# The folder helm-chart/kuberay-operator/crds of a KubeRay checkout, where somebody has one.
CRDS = os.environ.get("KUBERAY_CRDS")


def problems(content: dict[str, Any]) -> list[str]:
    """What is wrong with a Kubernetes object, one line for each field."""
    return _problems(_validator(content["kind"]), content)


def crd_problems(content: dict[str, Any]) -> list[str]:
    """The same, of a KubeRay object and by KubeRay's own definition."""
    return _problems(Draft202012Validator(strict(crd(content["kind"]))), content)


def _problems(validator: Any, content: dict[str, Any]) -> list[str]:
    return sorted(f"{error.json_path}: {error.message}" for error in validator.iter_errors(content))


@cache
def kuberay_schema() -> dict[str, Any]:
    path = ROOT / "cluster" / "schemas" / f"kuberay-{KUBERAY_VERSION}.yaml"
    return yaml.safe_load(path.read_text())


@cache
def _validator(kind: str) -> Any:
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    folder /= f"v{KUBERNETES_VERSION}-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text())
    registry = Registry().with_resources(
        (content["$id"], Resource.from_contents(content))
        for content in (definitions, kuberay_schema())
    )
    if kind in kuberay_schema()["$defs"]:
        schema = {"$ref": f"{kuberay_schema()['$id']}#/$defs/{kind}"}
    else:
        schema = json.loads((folder / f"{kind.lower()}-batch-v1.json").read_text())
    return Draft202012Validator(schema, registry=registry)


# ---------------------------------------------------------------------------- KubeRay's own CRDs


@cache
def crd(kind: str) -> dict[str, Any]:
    """The `v1` schema of a custom resource, from the folder that KUBERAY_CRDS names."""
    assert CRDS is not None
    path = Path(CRDS) / f"ray.io_{kind.lower()}s.yaml"
    versions = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    return schema


def strict(schema: Any) -> Any:
    """OpenAPI v3 as the API server reads it → JSON Schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # The values of `properties` are schemas; its keys are names, `properties` and `type` too.
    found = {
        key: {name: strict(part) for name, part in value.items()}
        if key == "properties"
        else strict(value)
        for key, value in schema.items()
        if not key.startswith("x-") and key != "format"
    }
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in schema and not open_ended:
        found["additionalProperties"] = False
    return found
