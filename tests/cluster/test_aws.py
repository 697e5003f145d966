"""cluster/aws.yaml started against a stand-in for AWS: what the account holds afterwards."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def account(tmp_path_factory):
    """The AWS account after `ray up` and one worker of each type."""
    pytest.importorskip("moto.server")
    pytest.importorskip("ray.autoscaler._private.aws.config")
    # Alone with a loopback, so that Ray's SSH cannot reach the address that moto made up; and all
    # that was started ends with the first process.
    alone = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if os.geteuid() != 0:
        alone.insert(1, "--map-root-user")
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("needs util-linux and iproute2")
    if subprocess.run([*alone, "true"], capture_output=True, timeout=20).returncode:
        pytest.skip("may not make a network namespace here")
    home = tmp_path_factory.mktemp("home")
    script = str(Path(__file__).with_name("up.py"))
    inside = 'ip link set lo up && exec "$@"'
    done = subprocess.run(
        [*alone, "bash", "-c", inside, "bash", sys.executable, script, str(home)],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
