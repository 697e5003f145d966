"""How Ray Train is set up; the trainings themselves are those of the other tests."""

import signal

from ray.train.torch import TorchTrainer

from stp_ray.config import load_config
from stp_ray.stages import cluster, supernet
from stp_ray.stages.jobs import Job
from tests.stages.runs import minimal

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
