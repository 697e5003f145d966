"""`ray up cluster/aws.yaml` against moto, and then one worker of each type as the autoscaler would
start it. Prints what the account then holds, as JSON.

It has to run where nothing but the loopback can be reached: `ray up` goes on to the address that
moto made up for the head.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import yaml
from moto.server import ThreadedMotoServer

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "cluster" / "aws.yaml"
ROLES = ("stp-ray-head", "stp-ray-worker")


def instances(ec2):
    return [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]


def head(ec2, log):
    """Run `ray up` until the head's instance is there; it would go on to wait for SSH."""
    ray = Path(sys.executable).parent / "ray"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(ray), "up", "-y", "--no-config-cache", str(FILE)],
            cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not instances(ec2):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def workers():
    """Start one of each type with the head's finished configuration, as the head itself does."""
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    config = prepare_config(yaml.safe_load(FILE.read_text()))
    config = _bootstrap_config(config, no_config_cache=True)
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    for name, machine in config["available_node_types"].items():
        if name != config["head_node_type"]:
            tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: name}
            provider.create_node(machine["node_config"], tags, 1)


def main(home):
    os.environ |= {
        "HOME": str(home),
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-west-2",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    iam, ec2 = boto3.client("iam"), boto3.client("ec2")
    for role in ROLES:  # as docs/cluster.md makes them
        iam.create_role(RoleName=role, AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName=role)
        iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
    head(ec2, home / "up.log")
    with contextlib.redirect_stdout(sys.stderr):
        workers()
    found = {
        "instances": instances(ec2),
        "groups": ec2.describe_security_groups()["SecurityGroups"],
        "roles": [role["RoleName"] for role in iam.list_roles()["Roles"]],
    }
    print(json.dumps(found, default=str))
    sys.stdout.flush()
    os._exit(0)  # moto's threads would be waited for


if __name__ == "__main__":
    main(Path(sys.argv[1]))
