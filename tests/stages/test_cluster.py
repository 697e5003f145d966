"""What a cluster has room for."""

import ray

from stp_ray.config import ClusterOptions
from stp_ray.stages import cluster


def test_a_worker_has_room_on_one_machine_or_none(monkeypatch):
    nodes = [
        {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 1.0}},
        {"Alive": True, "Resources": {}},
        {"Alive": False, "Resources": {"CPU": 8.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert cluster.places(ClusterOptions()) == 4
    assert cluster.places(ClusterOptions(threads_per_worker=2)) == 1
    assert cluster.places(ClusterOptions(use_gpu=True)) == 1
