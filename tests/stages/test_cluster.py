"""What a cluster has room for."""

from types import SimpleNamespace

import pytest
import ray

from stp_ray.config import ClusterOptions
from stp_ray.errors import ClusterError, DataError, RunError
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
        (RunError("the loss is not finite"), RunError, "^the loss is not finite$"),
        (ValueError("out of memory"), RunError, "looking failed.*out of memory.*goes on"),
    ],
)
def test_what_ends_a_task_is_told_in_one_line(monkeypatch, raised, told, words):
    def get(reference):
        error = ray.exceptions.RayTaskError("look", f"Traceback\n{raised!r}", raised)
        raise error.as_instanceof_cause()  # as Ray does

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda waiting, **_: (waiting, []))
    with pytest.raises(told, match=words) as caught:
        cluster.result(None, "looking", ClusterOptions())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_only_a_cluster_that_is_named_is_joined(monkeypatch, address):
    """Ray itself would join one that somebody has started on this machine."""
    given = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: given.update(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster.os, "environ", {})
    with cluster.connected(ClusterOptions(address=address)):
        assert given["address"] == (address or "local")
        assert ("num_cpus" in given) == (address is None)


@pytest.mark.parametrize(
    ("node", "waits"),
    [
        (None, True),  # a task: the driver may have joined by any address
        (SimpleNamespace(is_head=lambda: False), True),
        (SimpleNamespace(is_head=lambda: True), False),
    ],
)
def test_a_cluster_that_the_caller_has_joined_may_grow(monkeypatch, node, waits):
    asked = []
    group = SimpleNamespace(wait=lambda timeout_seconds: asked.append(timeout_seconds))
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(cluster, "placement_group", lambda bundles, strategy: group)
    monkeypatch.setattr(cluster, "remove_placement_group", lambda group: None)
    with pytest.raises(ClusterError, match="after 7 s" if waits else r"0 CPU; 2 workers"):
        cluster.require_resources(ClusterOptions(schedule_timeout_s=7), 2)
    assert asked == [7] * waits


def test_workers_do_not_get_the_limit_of_an_earlier_run(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster.os, "environ", environment := {})
    limit, seen = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", []
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(environment.get(limit)))
    cluster.wait_for_workers(ClusterOptions(schedule_timeout_s=60), 2)
    assert environment[limit] == "60.0"
    with cluster.connected(ClusterOptions()):
        environment[limit] = "7"  # the user's
    with cluster.connected(ClusterOptions()):
        assert seen == [None, "7"]


class Clock:
    """Time that passes while a cluster is asked, and what it has room for."""

    def __init__(self, monkeypatch, rooms):
        self.now, self.rooms, self.looks = 0.0, rooms, 0
        monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(cluster, "places", self.places)

    def places(self, options):
        self.looks += 1
        return self.rooms(self.now)

    def wait(self, waiting, *, num_returns, timeout):
        """Nothing ends."""
        self.now += timeout
        return [], waiting


@pytest.fixture
def passing(monkeypatch):
    return lambda rooms: Clock(monkeypatch, rooms)


def test_a_cluster_is_given_up_once_it_has_had_no_room_for_as_long_as_was_said(passing):
    clock = passing(lambda now: int(now < 5 or 13 <= now < 14))
    patience = cluster.Patience(ClusterOptions(schedule_timeout_s=10))
    given_up = []
    for _ in range(400):
        clock.now += 0.1
        given_up.append(patience.over())
        if given_up[-1]:
            break
    assert 23 <= clock.now < 26  # 8 s without room are not enough, nor are seen as part of it
    assert clock.looks <= clock.now + 1  # Ray is asked about once a second
    clock.rooms = lambda now: 1
    clock.now += 5
    assert patience.over()  # what was stopped stays so
    error = str(patience.error())
    assert "1 CPU" in error and "10 s" in error and "schedule_timeout_s" in error


def test_a_cluster_with_room_for_too_few_is_given_up(passing):
    clock = passing(lambda now: 2)
    enough, more = (cluster.Patience(ClusterOptions(schedule_timeout_s=10), n) for n in (2, 3))
    clock.now += 5
    assert not enough.over() and not more.over()
    clock.now += 6
    assert not enough.over() and more.over()
    assert "3 workers (3 CPU)" in str(more.error())


def test_a_driver_that_stood_still_looks_before_it_gives_up(passing):
    clock = passing(lambda now: 1)
    patience = cluster.Patience(ClusterOptions(schedule_timeout_s=10))
    clock.now += 1000
    assert not patience.over()


def test_a_task_without_a_machine_is_cancelled_and_told(passing, monkeypatch):
    clock, cancelled = passing(lambda now: 0), []
    monkeypatch.setattr(ray, "wait", clock.wait)
    monkeypatch.setattr(ray, "cancel", lambda reference, force: cancelled.append(reference))
    with pytest.raises(RunError, match=r"no machine .* for 10 s"):
        cluster.result("task", "looking", ClusterOptions(schedule_timeout_s=10))
    assert cancelled == ["task"] and 10 < clock.now < 13
