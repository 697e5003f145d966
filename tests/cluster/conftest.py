"""Clusters of machines that are network namespaces, each with a bucket of its own."""

import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.cluster.network import HOST, RAY_PORT, Network
from tests.stages.runs import stp, wait_for, write_recipe

RAY = str(Path(sys.executable).parent / "ray")

KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Cluster:
    """A head without work and workers of one CPU each, with a bucket that all of them reach."""

    def __init__(self, network, client, folder, variables):
        self._network, self._client, self._folder = network, client, folder
        self._variables = variables
        self.head = self.bare()
        self._started(
            self.head.start(
                RAY, "start", "--head", "--block", f"--port={RAY_PORT}", "--num-cpus=0",
                f"--node-ip-address={self.head.address}", f"--temp-dir={folder / 'ray'}",
                "--include-dashboard=false", "--disable-usage-stats",
            )
        )  # fmt: skip
        self.workers = [self.join() for _ in range(2)]

    def _started(self, process):
        """Wait for it: nodes that start at once in one folder get in each other's way."""
        up = "Ray runtime started"
        wait_for(lambda: up in process.output, 120, "a node", process.running)

    def bare(self):
        """A machine on which nothing runs."""
        return self._network.machine(self._folder, **self._variables)

    def join(self, machine=None):
        """A machine joins, a new one unless it is given."""
        machine = machine or self.bare()
        self._started(
            machine.start(
                "env", f"RAY_ADDRESS={self.head.address}:{RAY_PORT}",
                RAY, "start", "--block", f"--address={self.head.address}:{RAY_PORT}",
                "--num-cpus=1", f"--node-ip-address={machine.address}", "--disable-usage-stats",
            )
        )  # fmt: skip
        return machine

    def run(self, name, recipe, command=None):
        """Start a run of a recipe on the cluster (`stp run`, or another command); what it writes is
        under `name`."""
        (self._folder / name).mkdir()
        path = write_recipe(self._folder / name, recipe)
        # Some of Ray's own actors look for a cluster, and would find others on this computer.
        address = f"{self.head.address}:{RAY_PORT}"
        return self.head.start(
            "env", f"RAY_ADDRESS={address}",
            *(command or stp("run")), str(path), f"storage=s3://experiments/{name}",
            f"cluster.address={address}",
        )  # fmt: skip

    def found(self, name, part):
        """Names in a run's folder that contain this part."""
        pages = self._client.get_paginator("list_objects_v2")
        pages = pages.paginate(Bucket="experiments", Prefix=f"{name}/")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key.split("/", 2)[2] for key in keys if part in key}

    def read(self, name, file):
        (key,) = {n for n in self._keys(name) if n.endswith(f"/{file}")}
        return self._client.get_object(Bucket="experiments", Key=key)["Body"].read()

    def _keys(self, name):
        listed = self._client.list_objects_v2(Bucket="experiments", Prefix=f"{name}/")
        return [entry["Key"] for entry in listed.get("Contents", [])]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs Linux, root and iproute2")
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    try:
        network = Network()
    except RuntimeError as error:
        pytest.skip(f"may not make a bridge here: {error}")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = moto.ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    variables = {**KEYS, "AWS_ENDPOINT_URL": f"http://{HOST}:{port}"}
    client = boto3.client(
        "s3", endpoint_url=variables["AWS_ENDPOINT_URL"], region_name="us-east-1",
        aws_access_key_id="testing", aws_secret_access_key="testing",
    )  # fmt: skip
    client.create_bucket(Bucket="experiments")
    # Sockets lie in there: the path has to be short.
    with tempfile.TemporaryDirectory(prefix="stp-", dir="/tmp", ignore_cleanup_errors=True) as home:
        variables["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
        try:
            yield Cluster(network, client, Path(home), variables)
        finally:
            network.close()
            server.stop()
