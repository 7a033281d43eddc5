"""``ray_cluster.yaml`` as Ray reads it, and the nodes that Ray would ask AWS for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from tests.infra.autoscaler import of_features, of_stage, wanted_nodes

ROOT = Path(__file__).resolve().parents[2]
FILE, STACK = ROOT / "ray_cluster.yaml", ROOT / "infra" / "cluster" / "aws.yaml"
REGION = "us-west-2"
WORKERS = {"cpu-spot", "cpu-on-demand", "encoder-gpu", "training-gpu"}


@pytest.fixture(scope="module")
def prepared() -> dict[str, Any]:
    """The file with its defaults, as `ray up` has it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(FILE.read_text()))
    validate_config(config)
    return config


@pytest.fixture(scope="module")
def asked(
    prepared: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, dict[str, Any]]]:
    """What Ray's own provider asks EC2 for, by node type, once the stack is there."""
    from moto import mock_aws

    with pytest.MonkeyPatch.context() as patch, mock_aws(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what moto does not know of CloudFormation
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray keeps a key pair there
        for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        make_stack()
        yield launch(prepared)


def make_stack() -> None:
    ec2 = boto3.client("ec2", REGION)
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/20")["Subnet"]["SubnetId"]
    # moto makes no placement groups.
    template = STACK.read_text().replace("!Ref Together", "together")
    given = {"VpcId": vpc, "SubnetId": subnet, "Bucket": "dim"}
    stacks = boto3.client("cloudformation", REGION)
    stacks.create_stack(
        StackName="dim",
        TemplateBody=template,
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in given.items()],
    )
    (stack,) = stacks.describe_stacks(StackName="dim")["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"


def launch(prepared: dict[str, Any]) -> dict[str, dict[str, Any]]:
    from ray.autoscaler._private.aws import config as aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.aws.utils import client_cache, resource_cache

    for cache in (client_cache, resource_cache, aws._get_subnets_or_die):
        cache.cache_clear()  # of clients that another test made
    config = aws.bootstrap_aws(copy.deepcopy(prepared))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    asked: dict[str, dict[str, Any]] = {}
    for name, node_type in config["available_node_types"].items():
        calls: list[dict[str, Any]] = []
        provider.ec2_fail_fast.meta.client.meta.events.register(
            "provide-client-params.ec2.RunInstances",
            lambda params, calls=calls, **_: calls.append(copy.deepcopy(params)),
            unique_id="seen",
        )
        tags = {
            "ray-node-type": "head" if name == "head" else "worker",
            "ray-user-node-type": name,
            "ray-launch-config": "hash",
        }
        made = provider.create_node(node_type["node_config"], tags, 1)
        provider.ec2_fail_fast.meta.client.meta.events.unregister(
            "provide-client-params.ec2.RunInstances", unique_id="seen"
        )
        assert len(made) == len(calls) == 1
        asked[name] = calls[0]
    for cache in (client_cache, resource_cache, aws._get_subnets_or_die):
        cache.cache_clear()
    return asked


def test_groups_start_from_zero(prepared: dict[str, Any]) -> None:
    types = prepared["available_node_types"]
    assert set(types) == WORKERS | {"head"}
    assert types["head"]["resources"]["CPU"] == 0
    for name in WORKERS:
        assert types[name]["min_workers"] == 0 < types[name]["max_workers"]
        assert types[name]["idle_timeout_s"] > 0
        assert types[name]["resources"]["CPU"] > 0
    assert prepared["max_workers"] >= sum(types[name]["max_workers"] for name in WORKERS)


def test_nodes_say_who_they_are_and_from_which_image(asked: dict[str, dict[str, Any]]) -> None:
    assert set(asked) == WORKERS | {"head"}
    for name, call in asked.items():
        # EC2 looks the current image up by this name itself.
        assert call["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/x86_64/")
        assert "nvidia-driver" in call["ImageId"]
        assert call["IamInstanceProfile"] == {"Name": "dim-head" if name == "head" else "dim-node"}
        assert call["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in call["BlockDeviceMappings"])
        instance, volume = call["TagSpecifications"]
        tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
        assert tags["ray-cluster-name"] == tags["project"] == "dim"
        assert tags["ray-user-node-type"] == name
        assert volume["ResourceType"] == "volume"


def test_only_one_group_is_of_spot_machines(asked: dict[str, dict[str, Any]]) -> None:
    spot = {name for name, call in asked.items() if "InstanceMarketOptions" in call}
    assert spot == {"cpu-spot"}
    assert asked["cpu-spot"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert asked["cpu-spot"]["InstanceType"] == asked["cpu-on-demand"]["InstanceType"]


def test_training_nodes_lie_side_by_side_with_all_their_network_cards(
    asked: dict[str, dict[str, Any]],
) -> None:
    training = asked["training-gpu"]
    assert training["InstanceType"] == "p5.48xlarge"
    assert training["Placement"] == {"GroupName": "together"}
    cards = training["NetworkInterfaces"]
    assert [card["NetworkCardIndex"] for card in cards] == list(range(32))
    assert [card["DeviceIndex"] for card in cards] == [0, *[1] * 31]
    assert [card["InterfaceType"] for card in cards] == ["efa", *["efa-only"] * 31]


def test_all_nodes_are_in_one_subnet_and_group(asked: dict[str, dict[str, Any]]) -> None:
    places = {
        (card["SubnetId"], *card["Groups"])
        for call in asked.values()
        for card in call["NetworkInterfaces"]
    }
    assert len(places) == 1
    assert not any("AssociatePublicIpAddress" in str(call) for call in asked.values())


def test_the_stack_is_what_cloudformation_takes() -> None:
    from cfnlint.api import lint_file

    assert lint_file(STACK) == []


def test_what_the_stack_lets_the_head_do() -> None:
    class Loader(yaml.SafeLoader):
        """With CloudFormation's own tags as their values."""

    Loader.add_multi_constructor(
        "!", lambda loader, suffix, node: f"{suffix} {loader.construct_scalar(node)}"
    )
    resources = yaml.load(STACK.read_text(), Loader)["Resources"]  # noqa: S506 - a safe one
    statements = resources["HeadPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    allowed = {
        action: statement
        for statement in statements
        for action in (
            [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        )
    }
    assert {"ec2:RunInstances", "ec2:CreateTags", "ssm:GetParameters"} <= set(allowed)
    assert allowed["iam:PassRole"]["Resource"] == "GetAtt NodeRole.Arn"
    name = yaml.safe_load(FILE.read_text())["cluster_name"]
    ends = allowed["ec2:TerminateInstances"]["Condition"]["StringEquals"]
    assert ends == {"aws:ResourceTag/ray-cluster-name": name}
    group = resources["Group"]["Properties"]
    assert "SecurityGroupIngress" not in group  # nobody from outside
    inside = resources["GroupInside"]["Properties"]
    assert inside["SourceSecurityGroupId"] == inside["GroupId"] == "Ref Group"
    assert resources["Together"]["Properties"] == {"Strategy": "cluster"}


def test_containers_get_the_secret_the_token_and_the_shared_memory(
    prepared: dict[str, Any],
) -> None:
    docker = prepared["docker"]
    options = docker["run_options"]
    fetch = next(line for line in prepared["initialization_commands"] if "secretsmanager" in line)
    kept = fetch.rpartition("> ")[2]
    assert f"--env-file {kept}" in options and fetch.startswith("umask 077;")
    assert "--env RAY_AUTH_MODE=token" in options
    assert not any("shm-size" in option for option in options)  # Ray sizes it to the node
    for image in (docker["head_image"], docker["worker_image"]):
        assert image.startswith(f"ACCOUNT.dkr.ecr.{REGION}.amazonaws.com/")
    types = prepared["available_node_types"]
    for name in ("cpu-spot", "cpu-on-demand"):
        assert types[name]["docker"]["worker_image"] == docker["head_image"]
    devices = types["training-gpu"]["docker"]["worker_run_options"]
    assert "--device /dev/infiniband" in devices and "--ulimit memlock=-1" in devices


def test_the_dashboard_is_for_the_head_alone(prepared: dict[str, Any]) -> None:
    (start,) = [line for line in prepared["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert prepared["provider"]["use_internal_ips"] is True


def test_spot_machines_come_first_and_others_where_there_are_none() -> None:
    cluster, data = yaml.safe_load(FILE.read_text()), [{"CPU": 1.0}] * 32
    assert wanted_nodes(cluster, data) == {"cpu-spot": 2}
    assert wanted_nodes(cluster, data, {"cpu-spot": 0.0}) == {"cpu-on-demand": 2}


def test_features_and_stages_get_the_nodes_that_were_meant_for_them() -> None:
    cluster = yaml.safe_load(FILE.read_text())
    assert wanted_nodes(cluster, of_features()) == {"encoder-gpu": 2}
    for stage, nodes in (("t2i", 4), ("edit1", 1), ("edit2", 1)):
        assert wanted_nodes(cluster, of_stage(stage)) == {"training-gpu": nodes}, stage
