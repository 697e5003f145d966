"""What a cluster has room for."""

import pytest
import ray

from stp_ray.config import ClusterOptions
from stp_ray.errors import DataError, RunError
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


@pytest.mark.parametrize(
    ("raised", "told", "words"),
    [
        (DataError("no images"), DataError, "no images"),
        (ValueError("out of memory"), RunError, "looking failed.*out of memory.*goes on"),
    ],
)
def test_what_ends_a_task_is_told_in_one_line(monkeypatch, raised, told, words):
    def get(reference):
        raise ray.exceptions.RayTaskError("look", f"Traceback\n{raised!r}", raised)

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(told, match=words) as caught:
        cluster.result(None, "looking")
    assert "\n" not in str(caught.value)
