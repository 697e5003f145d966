"""One task per budget: what it costs, and what ends it."""

from types import SimpleNamespace

import pytest
import ray
import torch

from stp_ray.artifacts import Checkpoints, Store
from stp_ray.config import load_config
from stp_ray.elastic import Subnet
from stp_ray.stages import cluster, finalize
from stp_ray.stages.jobs import Job


@pytest.fixture
def job(tmp_path):
    config = load_config("demo")
    return Job(
        stage="finalize/0.5", kind="finalize", folder="budget-0.5", run_uri=str(tmp_path),
        config=config, options=config.finalize.optimisation,
    )  # fmt: skip


def test_a_task_that_is_tried_again_counts_the_attempt_that_was_lost(job, monkeypatch):
    weights = {"weights": torch.ones(1)}
    Checkpoints(job.store).save(3, weights, {"seconds": 100.0})
    Checkpoints(job.store.child("control")).save(5, weights, {"seconds": 20.0})
    monkeypatch.setattr(finalize, "train", lambda *arguments: None)
    monkeypatch.setattr(finalize, "prune", lambda *arguments: {"top1": 50.0})
    images = SimpleNamespace(here=lambda: None)
    pruned, seconds = finalize._finalize_task([job], images, None)
    assert pruned == {"top1": 50.0}
    assert 120.0 <= seconds < 130.0


def test_a_deletion_that_is_cut_off_leaves_nothing_to_another_shape(job, monkeypatch):
    first, second = (Subnet({"a": width}, []).to_json() for width in (4, 8))
    finalize.claim(job.run, "0.5", first)
    Checkpoints(job.store).save(30, {"weights": torch.ones(1)}, {})
    job.store.write_json("pruned.json", {"subnet_id": "of the first"})
    delete, left = Store.delete, iter([False, True, False])

    def cut_off(self, name):
        if not next(left):
            raise KeyboardInterrupt
        delete(self, name)

    monkeypatch.setattr(Store, "delete", cut_off)
    for _ in range(2):  # before anything is gone, and after the first file
        with pytest.raises(KeyboardInterrupt):
            finalize.claim(job.run, "0.5", second)
        assert job.store.read_bytes(finalize.SUBNET).decode().strip() == first
    monkeypatch.setattr(Store, "delete", delete)
    finalize.claim(job.run, "0.5", second)
    assert job.store.names() == [finalize.SUBNET]
    assert job.store.read_bytes(finalize.SUBNET).decode().strip() == second


def test_an_interruption_ends_the_tasks(job, monkeypatch):
    """In a session that the user opened, they would go on and write to the run's folder."""
    cancelled = []

    def interrupted(references, **options):
        raise KeyboardInterrupt

    task = SimpleNamespace(remote=lambda jobs, *others: jobs[0].stage)
    monkeypatch.setattr(cluster, "require_resources", lambda *arguments: None)
    monkeypatch.setattr(
        ray, "remote", lambda function: SimpleNamespace(options=lambda **options: task)
    )
    monkeypatch.setattr(ray, "wait", interrupted)
    monkeypatch.setattr(ray, "cancel", lambda reference, force: cancelled.append(reference))
    with pytest.raises(KeyboardInterrupt):
        list(finalize._side_by_side(job.config, {"0.5": [job]}, None, None))
    assert cancelled == ["finalize/0.5"]
