"""A whole run on three machines whose links are cut and which are killed; `make test-cluster`."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from stp_ray import preemption
from tests.cluster.cluster import RAY
from tests.stages.runs import BUDGETS, WEIGHTS, tiny, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

#: Seconds from a fault to the next progress.
RECOVERY_S = 60
#: Seconds that each step may take on a machine that is busy with other things.
PATIENCE_S = 300

#: Steps from a state to the next.
EVERY = 3

#: Prints the nodes that are being drained, or that have ended since, for they had nothing to do.
DRAINED = """
import ray
ray.init(logging_level="error")
draining = ray._private.state.state.get_draining_nodes()
for node in ray.nodes():
    state = "draining" if node["NodeID"] in draining else node["DeathReasonMessage"] or "alive"
    print(node["NodeManagerAddress"], state)
"""


def recipe_of_two():
    """Long enough for a fault to come in the middle of each stage."""

    def longer(epochs):
        return {"optimisation": {"epochs": epochs, "checkpoint_every": EVERY}}

    return tiny(
        cluster={"num_workers": 2, "schedule_timeout_s": 120, "max_failures": 10},
        supernet=longer(5),
        finalize=longer(10),
        explore={"generations": 4},
    )


@pytest.fixture(scope="module")
def undisturbed(cluster):
    """The run that nothing disturbed."""
    driver = cluster.run("undisturbed", recipe_of_two())
    assert driver.wait(PATIENCE_S) == 0, driver.output
    return {name: cluster.read("undisturbed", name) for name in (*WEIGHTS, "summary.json")}


def test_a_run_completes_on_three_machines(undisturbed):
    assert set(json.loads(undisturbed["summary.json"])["budgets"]) == set(BUDGETS)


def test_a_run_that_loses_every_machine_ends_in_one_line_and_goes_on(cluster, undisturbed):
    recipe = recipe_of_two()
    recipe["cluster"]["schedule_timeout_s"] = 20

    def ends_without_machines(ready):
        driver = cluster.run("alone", recipe)
        wait_for(ready, PATIENCE_S, "progress", driver.running)
        for machine in cluster.workers:
            machine.fail()  # all before any is waited for
        for machine in cluster.workers:
            machine.kill()
        assert driver.wait(PATIENCE_S) == 1, driver.output
        errors = [line for line in driver.output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, driver.output
        assert "no machine of the cluster has had room" in errors[0]
        assert "1 CPU" in errors[0] and "20 s" in errors[0]
        for machine in cluster.workers:
            cluster.join(machine)

    ends_without_machines(lambda: cluster.found("alone", "explore/parts/"))
    assert "explore/front.json" not in cluster.files("alone")
    ends_without_machines(
        lambda: {name for name in cluster.found("alone", "/checkpoint-") if name[0] == "b"}
    )
    assert not cluster.found("alone", "pruned.json")
    driver = cluster.run("alone", recipe)
    assert driver.wait(PATIENCE_S) == 0, driver.output
    for name in WEIGHTS:
        assert cluster.read("alone", name) == undisturbed[name], name


def test_a_cut_link_and_killed_machines_change_nothing(cluster, undisturbed, record_property):
    first, second = cluster.workers
    driver = cluster.run("disturbed", recipe_of_two())
    times = {}

    def newest():
        """Steps of the supernet that are saved."""
        names = cluster.found("disturbed", "supernet/checkpoint-")
        done = (name for name in names if name.endswith("complete.json"))
        return max((int(name.split("/")[1].partition("-")[2]) for name in done), default=0)

    def progress(condition, what, since):
        wait_for(condition, RECOVERY_S, what, driver.running)
        times[what] = round(time.monotonic() - since, 1)

    # The link of a worker is cut for 30 s; a machine that joins late takes its place.
    wait_for(newest, PATIENCE_S, "a state", driver.running)
    second.cut()
    cut = time.monotonic()
    mended = threading.Timer(30, second.mend)  # Ray does not take back a node it has given up
    mended.start()
    # A step needs both; two more states may be on their way, the next ones are of a new group.
    saved = newest() + 2 * EVERY
    late = cluster.join()
    machines = [first, late]
    progress(lambda: newest() > saved, "a link cut in training", cut)

    def at_work(name):
        """A machine that a task or an actor of this name runs on."""
        return next((machine for machine in machines if machine.runs(name)), None)

    # A machine dies while candidates are scored: there is another.
    parts = "explore/parts/"
    wait_for(lambda: cluster.found("disturbed", parts), PATIENCE_S, "a part", driver.running)
    victim = wait_for(lambda: at_work("ray::_Trial"), 30, "a worker", driver.running)
    victim.kill()
    killed = time.monotonic()
    front = "explore/front.json"
    assert not cluster.found("disturbed", front)
    joining = threading.Thread(target=cluster.join, args=(victim,))
    joining.start()
    # What it was scoring is scored again: else the stage would not end.
    progress(lambda: cluster.found("disturbed", front), "a machine killed in exploration", killed)

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
        progress(
            lambda label=label: cluster.found("disturbed", f"budget-{label}/") - before[label],
            what, killed,
        )  # fmt: skip
    joining.join()
    cluster.join(victim)

    mended.join()
    assert driver.wait(PATIENCE_S) == 0, driver.output
    for what, seconds in times.items():
        record_property(what, seconds)
        print(f"{what}: {seconds} s to the next progress")
    for name in WEIGHTS:
        assert cluster.read("disturbed", name) == undisturbed[name], name


def test_a_notice_drains_the_machine_that_got_it(cluster):
    # Processes of its own, too: Ray looks among them for the node that it is on.
    address = cluster.address
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
