"""cluster/aws.yaml started against a stand-in for AWS: what the account holds afterwards."""

import json
import sys

import pytest

from tests.cluster.apart import run_apart

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def account(tmp_path_factory):
    """The AWS account after `ray up` and one worker of each type."""
    pytest.importorskip("moto.server")
    pytest.importorskip("ray.autoscaler._private.aws.config")
    # Ray's SSH cannot reach the address that moto made up, and all that was started ends.
    home = tmp_path_factory.mktemp("home")
    output = run_apart([sys.executable, "-m", "tests.cluster.up", str(home)], home / "log", 180)
    return json.loads(output.splitlines()[-1])


def instance(account, kind):
    (found,) = [i for i in account["instances"] if tags(i)["ray-user-node-type"] == kind]
    return found


def tags(instance):
    return {tag["Key"]: tag["Value"] for tag in instance["Tags"]}


def role(instance):
    return instance["IamInstanceProfile"]["Arn"].rpartition("/")[2]


def test_the_head_is_a_small_machine_on_demand(account):
    head = instance(account, "head")
    assert head["InstanceType"] == "m6i.xlarge"
    assert head.get("InstanceLifecycle") is None
    assert role(head) == "stp-ray-head"
    expected = {"ray-cluster-name": "stp-ray", "ray-node-type": "head", "project": "stp-ray"}
    assert expected.items() <= tags(head).items()
    assert head["MetadataOptions"]["HttpTokens"] == "required"


@pytest.mark.parametrize(
    ("kind", "machine"), [("gpu_worker", "g6.4xlarge"), ("cpu_worker", "m6i.4xlarge")]
)
def test_workers_are_spot_with_the_lesser_role(account, kind, machine):
    worker = instance(account, kind)
    assert worker["InstanceType"] == machine
    assert worker["InstanceLifecycle"] == "spot"
    assert role(worker) == "stp-ray-worker"
    expected = {"ray-cluster-name": "stp-ray", "ray-node-type": "worker", "project": "stp-ray"}
    assert expected.items() <= tags(worker).items()
    assert worker["MetadataOptions"]["HttpTokens"] == "required"


def test_nothing_but_ssh_is_open_to_others(account):
    used = {g["GroupId"] for i in account["instances"] for g in i["SecurityGroups"]}
    rules = [r for g in account["groups"] if g["GroupId"] in used for r in g["IpPermissions"]]
    assert rules
    for rule in rules:
        public = rule["IpRanges"] or rule["Ipv6Ranges"] or rule["PrefixListIds"]
        inside = [pair["GroupId"] in used for pair in rule["UserIdGroupPairs"]]
        if public:
            assert (rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) == ("tcp", 22, 22)
        else:
            assert inside and all(inside)


def test_ray_makes_no_role_of_its_own(account):
    # Its default role may do everything with EC2 and S3.
    assert not [name for name in account["roles"] if name.startswith("ray-")]
