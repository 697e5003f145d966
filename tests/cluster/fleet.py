"""A run on machines that an autoscaler starts and stops: Ray's own, with processes for machines.
Writes, as JSON, how many workers there were while each stage ran and after it.

    python -m tests.cluster.fleet FOLDER

It has to run in namespaces of its own: Ray's way to start such a cluster ends every other one that
it finds first. What it starts ends with its process namespace.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import FAKE_HEAD_NODE_ID, AutoscalingCluster

from tests.stages.runs import Process, environment, tiny, write_recipe

#: Seconds without work after which a machine goes.
IDLE_S = 9
#: Seconds that a stage may take on a machine that is busy with other things.
PATIENCE_S = 240
#: Machines that the autoscaler may have at once: more than any stage asks for.
MOST = 5

FOUND = "found.json"
STAGES = ("supernet", "explore", "finalize")
#: Two train, three score, and each of two budgets is finished by one.
RECIPE = tiny(cluster={"num_workers": 2, "explore_workers": 3, "schedule_timeout_s": 60})

#: A cluster's file names them all; processes need none.
_COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
)  # fmt: skip


class Fleet(AutoscalingCluster):
    """A head without work, and workers of one CPU, at first none."""

    def __init__(self):
        worker = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": MOST}
        super().__init__({"CPU": 0}, {"worker": worker}, autoscaler_v2=True)

    def _generate_config(self, head_resources, worker_node_types, **options):
        """The file that Ray would begin with is not in its wheel."""
        module = "ray.autoscaler._private.fake_multi_node.node_provider"
        head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
        return {
            "cluster_name": "fleet",
            "max_workers": MOST,
            "idle_timeout_minutes": IDLE_S / 60,
            "provider": {
                "type": "external", "module": f"{module}.FakeMultiNodeProvider",
                "launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID,
            },
            "auth": {"ssh_user": "root"},
            "file_mounts": {},
            **{name: [] for name in _COMMANDS},
            "head_node_type": "ray.head.default",
            "available_node_types": {**worker_node_types, "ray.head.default": head},
        }  # fmt: skip


class Watch:
    """Follows how many workers there are: (seconds, workers) at each change."""

    def __init__(self):
        self._started = time.monotonic()
        self.changes = [(0.0, self._count())]
        threading.Thread(target=self._follow, daemon=True).start()

    @staticmethod
    def _count():
        return sum(node["Alive"] for node in ray.nodes()) - 1

    def _follow(self):
        while True:
            count = self._count()
            if count != self.now:
                self.changes.append((self.seconds(), count))
            time.sleep(0.1)

    def seconds(self):
        return time.monotonic() - self._started

    @property
    def now(self):
        return self.changes[-1][1]

    def wait_until_empty(self):
        deadline = self.seconds() + IDLE_S + 60
        while self.now and self.seconds() < deadline:
            time.sleep(0.1)


def run(until, watch, folder):
    """Run up to and with this stage, and wait for the workers to go."""
    before, started = watch.now, watch.seconds()
    stop = repr(until) if until != STAGES[-1] else None
    script = f"from stp_ray.cli import run_script; run_script(until={stop})"
    driver = Process(
        [sys.executable, "-c", script, str(folder / "recipe.yaml"), f"storage={folder / 'runs'}"],
        folder / f"{until}.log",
        env=environment(RAY_ADDRESS=ray.get_runtime_context().gcs_address),
    )
    code = driver.wait(PATIENCE_S)
    ended = watch.seconds()
    watch.wait_until_empty()
    changes = [(at - started, count) for at, count in watch.changes if at > started]
    return {
        "code": code,
        "output": driver.output,
        "before": before,
        "seconds": ended - started,
        "changes": changes,
        "left": watch.now,
        "empty_after_s": changes[-1][0] - (ended - started) if changes else 0.0,
    }


def main(folder):
    os.environ |= environment(
        RAY_TMPDIR=str(folder), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    write_recipe(folder, RECIPE)
    Fleet().start()
    ray.init("auto", logging_level="error", log_to_driver=False)
    watch = Watch()
    found = {}
    for stage in STAGES:
        found[stage] = run(stage, watch, folder)
        (folder / FOUND).write_text(json.dumps(found, indent=1))
        if found[stage]["code"]:
            break


if __name__ == "__main__":
    main(Path(sys.argv[1]))
