"""How Ray Train is set up; the trainings themselves are those of the other tests."""

import signal
import sys
import threading

import pytest
import ray
from ray.train.torch import TorchTrainer

from stp_ray.config import ClusterOptions, load_config
from stp_ray.stages import cluster, supernet
from stp_ray.stages.jobs import Job
from tests.stages.runs import ROOT, Process, environment, minimal

LIMIT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def trainer(tmp_path, **limits):
    config = load_config(minimal(cluster=limits))
    options = config.supernet.optimisation
    job = Job("supernet", "supernet", "supernet", str(tmp_path), config, options)
    return supernet._trainer(job, None, 2, None, str(tmp_path))


def test_an_interruption_is_left_to_the_driver(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    trainer(tmp_path)._register_sigint_handler(None)
    assert signal.getsignal(signal.SIGINT) is before
    assert hasattr(TorchTrainer, "_register_sigint_handler"), "Ray has another name for it"


class Ended:
    """A training whose controller can be ended."""

    def __init__(self):
        self.ended = threading.Event()

    def end(self):
        self.ended.set()


def test_a_training_that_is_interrupted_does_not_go_on_in_a_session_that_does():
    training = Ended()
    with pytest.raises(KeyboardInterrupt), supernet._ended(training, None):
        raise KeyboardInterrupt
    assert training.ended.is_set()
    finished = Ended()
    with supernet._ended(finished, None):
        pass
    assert not finished.ended.is_set()


def test_a_controller_that_died_otherwise_is_no_lost_machine():
    patience = cluster.Patience(ClusterOptions(), 1)
    died = ray.exceptions.RayActorError()
    with pytest.raises(ray.exceptions.RayActorError), supernet._ended(Ended(), patience):
        raise died


#: Trains on the one machine of a cluster, which is lost once there is a checkpoint.
LOSES = """
import sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
import stp_ray as stp
from stp_ray.errors import RunError
from tests.stages.runs import minimal

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    machine = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, logging_level="error")

    def lose():
        while not list(Path(sys.argv[1]).glob("*/supernet/checkpoint-*")):
            time.sleep(0.1)
        cluster.remove_node(machine)

    threading.Thread(target=lose, daemon=True).start()
    elastic = {"in_process": False, "num_workers": 2, "min_workers": 1, "schedule_timeout_s": 5}
    long = {"optimisation": {"epochs": 1000}}
    try:
        stp.run(minimal(storage=sys.argv[1], supernet=long, cluster=elastic))
    except RunError as error:
        print("told:", error)
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.timeout(240)
def test_an_elastic_training_that_lost_every_machine_ends(tmp_path):
    """Ray itself would wait for them for ever."""
    process = Process(
        [sys.executable, "-c", LOSES, str(tmp_path / "runs")], tmp_path / "log",
        env=environment(PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    try:
        assert process.wait(200) == 0, process.output
    finally:
        process.end()
    assert "told: no machine of the cluster has had room for a worker" in process.output
    assert "the same command goes on" in process.output


def test_the_process_that_trains_waits_as_long_as_the_recipe_says(tmp_path, monkeypatch):
    monkeypatch.delenv(LIMIT, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(cluster.os, "environ", environment := {})
        trainer(tmp_path, schedule_timeout_s=1234)
        assert environment[LIMIT] == "1234.0"
    with monkeypatch.context() as patch:
        patch.setattr(cluster.os, "environ", environment := {})
        trainer(tmp_path, schedule_timeout_s=1234, min_workers=1)
        assert LIMIT not in environment
    with monkeypatch.context() as patch:
        patch.setattr(cluster.os, "environ", environment := {})
        trainer(tmp_path, schedule_timeout_s=1234, min_workers=2)  # as many as there are to be
        assert environment[LIMIT] == "1234.0"


def test_every_run_of_a_process_has_its_own_limit_but_where_the_user_set_one(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.os, "environ", environment := {})
    trainer(tmp_path, schedule_timeout_s=60)
    trainer(tmp_path, schedule_timeout_s=1800)
    assert environment[LIMIT] == "1800.0"
    trainer(tmp_path, schedule_timeout_s=1800, min_workers=1)
    assert LIMIT not in environment
    environment[LIMIT] = "7"
    trainer(tmp_path, schedule_timeout_s=1800)
    assert environment[LIMIT] == "7"
