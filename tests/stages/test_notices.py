"""Notices of machines that leave; tests/cluster shows the whole way from drain to checkpoint."""

import pytest

from stp_ray.stages import notices
from tests.stages.runs import wait_for


@pytest.fixture
def cluster(monkeypatch):
    """Nodes that leave, of a cluster that is not there."""
    nodes = set()
    monkeypatch.setattr(notices, "_LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(notices, "leaving", lambda: set(nodes))
    monkeypatch.setattr(notices.ray, "is_initialized", lambda: True)
    return nodes


def test_each_node_that_leaves_is_noticed_once(cluster):
    with notices.Notices() as looking:
        assert not looking.taken()
        cluster.add("a")
        wait_for(looking.taken, 10, "the first")
        assert not looking.taken()
        cluster.add("b")
        wait_for(looking.taken, 10, "the second")
        cluster.clear()  # they are gone
        assert not looking.taken()


def test_a_cluster_that_does_not_answer_is_asked_again(cluster, monkeypatch):
    answers = iter([ConnectionError("away")] * 3)

    def leaving():
        for error in answers:
            raise error
        return {"a"}

    monkeypatch.setattr(notices, "leaving", leaving)
    with notices.Notices() as looking:
        wait_for(looking.taken, 10, "the node")


def test_without_ray_nothing_leaves():
    with notices.Notices() as looking:
        assert not looking.taken()
