"""A cluster whose machines are network namespaces, and a bucket that all of them reach."""

import contextlib
import logging
import sys
import tempfile
from pathlib import Path

from tests.cluster.network import HOST, RAY_PORT
from tests.stages.runs import stp, wait_for, write_recipe

RAY = str(Path(sys.executable).parent / "ray")
BUCKET = "experiments"

KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Cluster:
    """A head without work and workers of one CPU each.

    Args:
        network: where the machines are.
        client: reaches the bucket.
        folder: for logs and Ray's sockets: its path has to be short.
        variables: environment of all that runs on the machines.
        disk_mb: size of a worker's own disk, on which are its temporary files and Ray's; None: it
            shares this computer's.
    """

    def __init__(self, network, client, folder, variables, disk_mb=None):
        self._network, self._client, self._folder = network, client, folder
        self._variables, self._disk_mb = variables, disk_mb
        self.head = self.bare()
        self._start_head()
        self.workers = [self.join() for _ in range(2)]

    def _start_head(self):
        self._started(
            self.head.start(
                RAY, "start", "--head", "--block", f"--port={RAY_PORT}", "--num-cpus=0",
                f"--node-ip-address={self.head.address}", f"--temp-dir={self._folder / 'ray'}",
                "--include-dashboard=false", "--disable-usage-stats",
            )
        )  # fmt: skip

    def _started(self, process):
        """Wait for it: nodes that start at once in one folder get in each other's way."""
        up = "Ray runtime started"
        wait_for(lambda: up in process.output, 120, "a node", process.running)
        return process

    def bare(self):
        """A machine on which nothing runs."""
        return self._network.machine(self._folder, **self._variables)

    def join(self, machine=None):
        """A machine joins, a new one unless it is given."""
        machine = machine or self.bare()
        disk = ()
        if self._disk_mb:
            # Each machine has its own mounts, too.
            mount = f'mount -t tmpfs -o size={self._disk_mb}m tmpfs /tmp && exec "$@"'
            disk = ("sh", "-c", mount, "sh")
        process = machine.start(
            *disk, "env", f"RAY_ADDRESS={self.address}",
            RAY, "start", "--block", f"--address={self.address}",
            "--num-cpus=1", f"--node-ip-address={machine.address}", "--disable-usage-stats",
        )  # fmt: skip
        machine.disk = Path("/proc", str(self._started(process).pid), "root", "tmp")
        return machine

    def renew(self):
        """Every machine is lost, and starts again."""
        machines = [self.head, *self.workers]
        for machine in machines:
            machine.kill()
        self._start_head()
        for machine in self.workers:
            self.join(machine)

    @property
    def address(self):
        return f"{self.head.address}:{RAY_PORT}"

    def run(self, name, recipe, command=None, *overrides):
        """Start a run of a recipe on the cluster (`stp run`, or another command), or go on with it;
        what it writes is under `name`."""
        (self._folder / name).mkdir(exist_ok=True)
        path = write_recipe(self._folder / name, recipe)
        # Some of Ray's own actors look for a cluster, and would find others on this computer.
        return self.head.start(
            "env", f"RAY_ADDRESS={self.address}",
            *(command or stp("run")), str(path), f"storage=s3://{BUCKET}/{name}",
            f"cluster.address={self.address}", *overrides,
        )  # fmt: skip

    def files(self, name):
        """Names of all files in a run's folder."""
        return {key.split("/", 2)[2] for key in self._keys(name)}

    def found(self, name, part):
        """Names in a run's folder that contain this part."""
        return {file for file in self.files(name) if part in file}

    def read(self, name, file):
        (key,) = {key for key in self._keys(name) if key.split("/", 2)[2] == file}
        return self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def _keys(self, name):
        pages = self._client.get_paginator("list_objects_v2")
        pages = pages.paginate(Bucket=BUCKET, Prefix=f"{name}/")
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


@contextlib.contextmanager
def bucket():
    """An S3 server with an empty bucket at the address that all machines reach: (url, client)."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    try:
        url = f"http://{HOST}:{server.get_host_and_port()[1]}"
        client = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1",
            aws_access_key_id="testing", aws_secret_access_key="testing",
        )  # fmt: skip
        client.create_bucket(Bucket=BUCKET)
        yield url, client
    finally:
        server.stop()


@contextlib.contextmanager
def opened(network, client, url, disk_mb=None, **more):
    """A cluster whose runs reach the bucket at `url`, in a folder of its own; `more` of its
    environment."""
    with tempfile.TemporaryDirectory(prefix="stp-", dir="/tmp", ignore_cleanup_errors=True) as home:
        variables = {
            **KEYS, "AWS_ENDPOINT_URL": url, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", **more,
        }  # fmt: skip
        yield Cluster(network, client, Path(home), variables, disk_mb)
