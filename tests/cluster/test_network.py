"""A whole run on three machines whose links are cut and which are killed; `make test-cluster`."""

import json
import logging
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

from stp_ray import preemption
from tests.cluster.network import HOST, RAY_PORT, Network
from tests.stages.runs import BUDGETS, WEIGHTS, stp, tiny, wait_for, write_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

RAY = str(Path(sys.executable).parent / "ray")
#: Seconds from a fault to the next progress.
RECOVERY_S = 60
#: Seconds that each step may take on a machine that is busy with other things.
PATIENCE_S = 300

KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

#: Prints the nodes that are being drained, or that have ended since, for they had nothing to do.
DRAINED = """
import ray
ray.init(logging_level="error")
draining = ray._private.state.state.get_draining_nodes()
for node in ray.nodes():
    state = "draining" if node["NodeID"] in draining else node["DeathReasonMessage"] or "alive"
    print(node["NodeManagerAddress"], state)
"""


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

    def run(self, name):
        """Start a run with this name on the cluster; what it writes is under `name`."""
        recipe = write_recipe(self._folder, recipe_of_two())
        # Some of Ray's own actors look for a cluster, and would find others on this computer.
        address = f"{self.head.address}:{RAY_PORT}"
        return self.head.start(
            "env", f"RAY_ADDRESS={address}",
            *stp("run", str(recipe), f"storage=s3://experiments/{name}",
                 f"cluster.address={address}"),
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


def recipe_of_two():
    """Long enough for a fault to come in the middle of each stage."""
    longer = {"optimisation": {"epochs": 5, "checkpoint_every": 3}}
    return tiny(
        cluster={"num_workers": 2, "schedule_timeout_s": 120, "max_failures": 10},
        supernet=longer,
        finalize=longer,
        explore={"generations": 4},
    )


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


@pytest.fixture(scope="module")
def undisturbed(cluster):
    """The run that nothing disturbed."""
    driver = cluster.run("undisturbed")
    assert driver.wait(PATIENCE_S) == 0, driver.output
    return {name: cluster.read("undisturbed", name) for name in (*WEIGHTS, "summary.json")}


def test_a_run_completes_on_three_machines(undisturbed):
    assert set(json.loads(undisturbed["summary.json"])["budgets"]) == set(BUDGETS)


def test_a_cut_link_and_killed_machines_change_nothing(cluster, undisturbed, record_property):
    second = cluster.workers[1]
    driver = cluster.run("disturbed")
    times = {}

    def progress(part, before, what, since):
        wait_for(
            lambda: cluster.found("disturbed", part) - before, RECOVERY_S, what, driver.running
        )
        times[what] = round(time.monotonic() - since, 1)

    # The link of a worker is cut for 30 s; a machine that joins late takes its place.
    states = "supernet/checkpoint-"
    done = "complete.json"
    wait_for(lambda: cluster.found("disturbed", states), PATIENCE_S, "a state", driver.running)
    second.cut()
    cut = time.monotonic()
    late = cluster.join()
    time.sleep(10)  # what was on its way is there
    before = {name for name in cluster.found("disturbed", states) if name.endswith(done)}
    assert "supernet/result.json" not in cluster.found("disturbed", "supernet/")
    progress(states, before | cluster.found("disturbed", states), "a link cut in training", cut)
    time.sleep(max(0.0, 30 - (time.monotonic() - cut)))
    second.mend()
    second.kill()  # Ray does not take back a node that it has given up
    machines = [cluster.workers[0], late, cluster.join(second)]

    def at_work(name):
        """A machine that a task or an actor of this name runs on."""
        return next((machine for machine in machines if machine.runs(name)), None)

    # A machine dies while candidates are scored: there are two others.
    parts = "explore/parts/"
    wait_for(lambda: cluster.found("disturbed", parts), PATIENCE_S, "a part", driver.running)
    victim = wait_for(lambda: at_work("ray::_Trial"), 30, "a worker", driver.running)
    victim.kill()
    killed = time.monotonic()
    assert "explore/front.json" not in cluster.found("disturbed", "explore/")
    # What it was scoring is scored again: else the stage would not end.
    progress("explore/front.json", set(), "a machine killed in exploration", killed)
    cluster.join(victim)

    # And one while the budgets are finalised.
    states = "/checkpoint-"

    def finalising():
        return {n for n in cluster.found("disturbed", states) if n.startswith("budget-")}

    wait_for(finalising, PATIENCE_S, "a budget's state", driver.running)
    victim = wait_for(lambda: at_work("ray::_finalize_task"), 30, "a worker", driver.running)
    victim.kill()
    killed = time.monotonic()
    assert not cluster.found("disturbed", "pruned.json")
    # One of the budgets was on that machine.
    before = {label: cluster.found("disturbed", f"budget-{label}/") for label in BUDGETS}
    for label in BUDGETS:
        what = f"a machine killed in finalising: budget {label}"
        progress(f"budget-{label}/", before[label], what, killed)

    assert driver.wait(PATIENCE_S) == 0, driver.output
    for what, seconds in times.items():
        record_property(what, seconds)
        print(f"{what}: {seconds} s to the next progress")
    for name in WEIGHTS:
        assert cluster.read("disturbed", name) == undisturbed[name], name


def test_a_notice_drains_the_machine_that_got_it(cluster):
    # Processes of its own, too: Ray looks among them for the node that it is on.
    address = f"{cluster.head.address}:{RAY_PORT}"
    machine = cluster.bare()
    steps = (
        f"{RAY} start --address={address} --num-cpus=1 --node-ip-address={machine.address} "
        f"--disable-usage-stats && {sys.executable} {preemption.__file__} now; "
        "echo the watcher ended with $?; sleep 60"
    )
    alone = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    path = f"PATH={Path(RAY).parent}:{os.environ['PATH']}"
    watched = machine.start(*alone, "env", path, "bash", "-c", steps)
    wait_for(lambda: "the watcher ended with" in watched.output, 90, "the watcher", watched.running)
    assert "the watcher ended with 0" in watched.output, watched.output
    look = cluster.head.start("env", f"RAY_ADDRESS={address}", sys.executable, "-c", DRAINED)
    assert look.wait(60) == 0, look.output
    gone = ("draining", "the cloud takes this spot machine away")
    states = [line.split(" ", 1) for line in look.output.splitlines() if line[:1].isdecimal()]
    # It, and no other: machines that other tests have killed are listed as well.
    assert [node for node, state in states if state in gone] == [machine.address], look.output
