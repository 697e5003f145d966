"""A training that loses a machine, goes on with the other, and takes a third; and one that is told
that its machine goes away. `make test-cluster`."""

import json
import multiprocessing
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stp_ray.config import load_config
from stp_ray.stages import pipeline
from tests.cluster.cluster import RAY
from tests.stages.runs import ROOT, tiny, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

#: Seconds that each step may take on a machine that is busy with other things.
PATIENCE_S = 300
TRAIN = [sys.executable, str(ROOT / "pipelines" / "supernet.py")]
WORKER = "ray::RayTrainWorker"
SEEDS = (0, 1, 2)
#: Long enough for two changes of the group.
EPOCHS = 60


def recipe(cluster=(), optimisation=(), subnets=1, **sections):
    """One training by two workers or one."""
    elastic = {"num_workers": 2, "min_workers": 1, "resize_every_s": 5, "max_failures": 10}
    return tiny(
        supernet={
            "optimisation": {"checkpoint_every": 0, **dict(optimisation)},
            "stimulation": {"subnets": subnets},
        },
        cluster={**elastic, "schedule_timeout_s": 120, **dict(cluster)},
        **sections,
    )


def curve(folder):
    """Loss of the supernet in each epoch."""
    (path,) = Path(folder).glob("*/supernet/metrics.parquet")
    return pq.read_table(path).column("loss").to_pylist()


def test_the_curve_of_two_then_one_then_two_workers_is_that_of_two(cluster, tmp_path):
    longer = {"epochs": EPOCHS}
    alone = [
        load_config(
            recipe(
                {"in_process": True}, longer, seed=seed, storage=str(tmp_path / str(seed)),
                tracking={"console": False},
            )
        )
        for seed in SEEDS
    ]  # fmt: skip
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(pipeline.run, until="supernet"), alone))
    undisturbed = [curve(tmp_path / str(seed)) for seed in SEEDS]

    driver = cluster.run("elastic", recipe(optimisation=longer), TRAIN)
    times = {}

    def at_work(count):
        return lambda: sum(machine.runs(WORKER) for machine in machines) == count

    def progress(count, what, since):
        """That many machines train, and a checkpoint is written."""
        wait_for(at_work(count), PATIENCE_S, f"{count} workers after {what}", driver.running)
        before = cluster.found("elastic", "supernet/checkpoint-")
        wait_for(
            lambda: cluster.found("elastic", "supernet/checkpoint-") - before, PATIENCE_S,
            f"a checkpoint after {what}", driver.running,
        )  # fmt: skip
        times[what] = round(time.monotonic() - since, 1)

    machines = cluster.workers
    progress(2, "the start", time.monotonic())
    killed = time.monotonic()
    machines.pop().kill()
    progress(1, "a machine was killed", killed)
    joined = time.monotonic()
    machines.append(cluster.join())
    progress(2, "a machine joined", joined)
    assert "supernet/result.json" not in cluster.found("elastic", "supernet/"), "it ended too soon"
    assert driver.wait(PATIENCE_S) == 0, driver.output
    print(times)

    content = cluster.read("elastic", "supernet/metrics.parquet")
    (tmp_path / "elastic" / "run" / "supernet").mkdir(parents=True)
    (tmp_path / "elastic" / "run" / "supernet" / "metrics.parquet").write_bytes(content)
    losses = curve(tmp_path / "elastic")
    assert len(losses) == EPOCHS
    assert losses[-1] < losses[0] / 2
    # Steps of the same images and subnets: apart by rounding, where seeds are apart by far more.
    apart = [abs(a - b) for a, b in zip(losses, undisturbed[0], strict=True)]
    spread = [statistics.stdev(each) for each in zip(*undisturbed, strict=True)]
    print(f"apart {statistics.mean(apart):.4f}, spread over seeds {statistics.mean(spread):.4f}")
    assert statistics.mean(apart) < statistics.mean(spread)
    assert apart[0] < 1e-3


def test_a_notice_makes_a_checkpoint_at_once(cluster):
    # Without the notice the first checkpoint is that of the epoch's last step.
    data = {"name": "digits", "limit": None, "holdout": 32}
    optimisation = {"epochs": 1, "batch_size": 2, "lr": 0.001}
    slow = recipe(optimisation=optimisation, subnets=2, data=data)
    driver = cluster.run("notice", slow, TRAIN)
    machine = cluster.workers[0]
    wait_for(lambda: machine.runs(WORKER), PATIENCE_S, "a worker", driver.running)
    step = re.compile(r"^supernet +\d+/(\d+)", re.MULTILINE)
    wait_for(lambda: step.search(driver.output), PATIENCE_S, "a step", driver.running)
    assert not cluster.found("notice", "checkpoint-")
    drained = time.monotonic()
    drain(cluster, machine, seconds=60)
    wait_for(lambda: cluster.found("notice", "complete.json"), 30, "a checkpoint", driver.running)
    print(f"a checkpoint {time.monotonic() - drained:.1f} s after the notice")
    saved = min(cluster.found("notice", "complete.json"))
    assert int(re.search(r"checkpoint-(\d+)", saved)[1]) < int(step.search(driver.output)[1])
    driver.end()


def drain(cluster, machine, seconds):
    """What the watcher of a spot machine does."""
    address = cluster.address
    look = "import ray, json; ray.init(logging_level='error'); print(json.dumps(ray.nodes()))"
    listing = cluster.head.start("env", f"RAY_ADDRESS={address}", sys.executable, "-c", look)
    assert listing.wait(60) == 0, listing.output
    nodes = json.loads(listing.output.splitlines()[-1])
    (node,) = [n["NodeID"] for n in nodes if n["Alive"] and n["NodeName"] == machine.address]
    done = machine.start(
        RAY, "drain-node", "--address", address, "--node-id", node,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test",
        "--deadline-remaining-seconds", str(seconds),
    )  # fmt: skip
    assert done.wait(60) == 0, done.output
