"""cluster/aws.yaml as `ray up` reads it: Ray's schema, Ray's own preparation against a mock of EC2,
and EC2's parameter names for what Ray passes through."""

import copy
import re
from functools import cache
from typing import Any

import pytest
import yaml
from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES
from botocore.session import get_session
from botocore.validate import ParamValidator
from jsonschema import ValidationError

from cluster.secrets import names_secret, refuse_secrets
from tests.cluster.pools import ROOT, check_pools

PATH = ROOT / "cluster" / "aws.yaml"
CONFIG: dict[str, Any] = yaml.safe_load(PATH.read_text())
POOLS = ("teacher", "trainer", "data")
# What Ray's provider takes out of a node's configuration before it asks EC2 for the machine.
RAYS_OWN = {"SubnetIds", "SecurityGroupIds"}


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` does it: defaults filled in, then the schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    filled = prepare_config(copy.deepcopy(config))
    validate_config(filled)
    return filled


def test_the_file_fits_rays_schema():
    filled = prepared(CONFIG)
    for name in ("initialization_commands", "setup_commands", "head_setup_commands"):
        assert filled[name] == []  # Ray's defaults install a nightly Ray over the image's


@pytest.mark.parametrize(
    "place",
    [
        (),
        ("auth",),
        ("docker",),
        ("provider", "security_group"),
        *(("available_node_types", name) for name in ("head", *POOLS)),
    ],
)
def test_a_misspelt_field_is_noticed(place):
    broken = copy.deepcopy(CONFIG)
    _at(broken, place)["misspelt"] = 1
    with pytest.raises(ValidationError, match="misspelt"):
        prepared(broken)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("max_workers",), "16"),
        (("idle_timeout_minutes",), -5),
        (("docker", "pull_before_run"), "yes"),
        (("head_start_ray_commands",), "ray start"),
        (("available_node_types", "teacher", "max_workers"), 8.5),
        (("available_node_types", "teacher", "resources", "GPU"), "1"),
        (("available_node_types", "teacher", "labels", "pool"), 1),
    ],
)
def test_a_wrong_value_is_noticed(place, value):
    broken = copy.deepcopy(CONFIG)
    _at(broken, place[:-1])[place[-1]] = value
    with pytest.raises(ValidationError):
        prepared(broken)


def test_a_head_that_is_no_node_type_is_noticed():
    with pytest.raises(ValueError, match="head_node_type"):
        prepared({**CONFIG, "head_node_type": "master"})


def test_ec2_knows_every_parameter_of_a_machine(node_types):
    for name, node_type in node_types.items():
        machine = node_type["node_config"]
        assert ec2_problems(machine) == "", name
        assert "MarketOption" in ec2_problems(machine | {"InstanceMarketOption": {}})
        assert "VolumeSise" in ec2_problems(
            machine | {"BlockDeviceMappings": [{"Ebs": {"VolumeSise": 200}}]}
        )


def test_the_pools_have_what_the_recipe_asks_for(node_types):
    """Sizes as Ray finds them from the instance types."""
    node_types = dict(node_types)
    head = node_types.pop("head")
    assert head["resources"]["CPU"] == 0 and head["max_workers"] == 0
    check_pools(node_types)
    assert sum(kind["max_workers"] for kind in node_types.values()) <= CONFIG["max_workers"]


def test_who_may_do_what():
    machines = {name: kind["node_config"] for name, kind in CONFIG["available_node_types"].items()}
    profiles = {name: machine["IamInstanceProfile"]["Name"] for name, machine in machines.items()}
    assert profiles == {"head": "one-step-dmd-head"} | dict.fromkeys(POOLS, "one-step-dmd-node")
    spot = {name for name, machine in machines.items() if "InstanceMarketOptions" in machine}
    assert spot == {"teacher", "data"}
    assert all(
        machine["MetadataOptions"]["HttpTokens"] == "required" for machine in machines.values()
    )
    (ssh,) = CONFIG["provider"]["security_group"]["IpPermissions"]
    assert (ssh["FromPort"], ssh["ToPort"]) == (22, 22)
    assert not any(source["CidrIp"].startswith("0.0.0.0") for source in ssh["IpRanges"])


ENVIRONMENT = dict(
    option.removeprefix("-e ").split("=", 1)
    for option in CONFIG["docker"]["run_options"]
    if option.startswith("-e ")
)


def test_the_store_is_sought_in_the_clusters_region():
    """In the variable that the store's client reads."""
    _, variable, *_ = BOTOCORE_DEFAUT_SESSION_VARIABLES["region"]
    assert ENVIRONMENT[variable] == CONFIG["provider"]["region"]


def test_the_token_is_on_and_the_dashboard_on_loopback():
    environment = ENVIRONMENT
    assert environment["RAY_AUTH_MODE"] == "token"
    # Where the token is, not the token.
    assert {name for name in environment if names_secret(name)} == {"RAY_AUTH_TOKEN_PATH"}
    assert CONFIG["file_mounts"] == {environment["RAY_AUTH_TOKEN_PATH"]: "~/.ray/auth_token"}
    (start,) = (line for line in CONFIG["head_start_ray_commands"] if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in start and "--head" in start
    refuse_secrets(CONFIG["available_node_types"])


def test_the_image_is_that_of_the_other_cluster_files():
    kuberay = (ROOT / "cluster" / "kuberay" / "raycluster.yaml").read_text()
    assert set(re.findall(r"image: (\S+)", kuberay)) == {CONFIG["docker"]["image"]}


# --------------------------------------------------------------------------------------- helpers


@pytest.fixture(scope="module")
def node_types(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """As `ray up` goes on, in a mock of EC2: network, key pair, sizes from the instance types."""
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray keeps the key pair there
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        ready = bootstrap_aws(prepared(CONFIG))
        ready = AWSNodeProvider.fillout_available_node_types_resources(ready)
    return ready["available_node_types"]


def ec2_problems(machine: dict[str, Any]) -> str:
    """What EC2's interface says to a request for such a machine; "": nothing."""
    request = {key: value for key, value in machine.items() if key not in RAYS_OWN}
    report = ParamValidator().validate(request | {"MinCount": 1, "MaxCount": 1}, _run_instances())
    return report.generate_report()


@cache
def _run_instances() -> Any:
    return get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _at(content: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        content = content[key]
    return content
