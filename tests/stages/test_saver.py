"""Checkpoints on their way beside the training: in order, whole, and never lost in silence."""

import threading

import pytest
import torch

from stp_ray.artifacts import Checkpoints, Store
from stp_ray.errors import StorageError
from stp_ray.stages.saver import Saver


class Slow(Checkpoints):
    """Waits to be let go before it writes."""

    def __init__(self, store):
        super().__init__(store)
        self.go, self.failing = threading.Event(), False

    def save(self, step, tensors, meta):
        assert self.go.wait(30)
        if self.failing:
            raise StorageError("the disk is full")
        super().save(step, tensors, meta)


@pytest.fixture
def slow(tmp_path):
    return Slow(Store(tmp_path / "run"))


def state(step):
    return step, {"weight": torch.full((3,), float(step))}, {"step": step}


def test_training_does_not_wait_for_the_storage_and_the_end_does(slow):
    with Saver(slow) as saver:
        saver.save(*state(1))  # would wait for ever
        assert slow.latest() is None
        threading.Timer(0.2, slow.go.set).start()
    step, tensors, meta = slow.latest()
    assert (step, meta["step"]) == (1, 1)
    assert torch.equal(tensors["weight"], torch.ones(3))


def test_one_state_is_on_its_way_at_a_time(slow):
    with Saver(slow) as saver:
        saver.save(*state(1))
        threading.Timer(0.2, slow.go.set).start()
        saver.save(*state(2))
        assert slow.latest()[0] >= 1  # the first is written before the second is taken
    assert slow.latest()[0] == 2


def test_training_does_not_wait_long_for_slow_storage(slow, caplog):
    """Other workers would give up a step that one does not come to."""
    with Saver(slow, patience_s=0.1) as saver:
        assert saver.save(*state(1))
        assert not saver.save(*state(2))
        assert "no checkpoint of step 2" in caplog.text
        slow.go.set()
        while not saver.save(*state(3)):
            pass
    assert slow.latest()[0] == 3


def test_what_went_wrong_is_raised_by_the_next_call(slow):
    slow.go.set()
    slow.failing = True
    with Saver(slow) as saver:
        saver.save(*state(1))
        with pytest.raises(StorageError, match="the disk is full"):
            saver.save(*state(2))


def test_what_went_wrong_with_the_last_is_raised_at_the_end(slow):
    slow.go.set()
    slow.failing = True
    with pytest.raises(StorageError, match="the disk is full"), Saver(slow) as saver:
        saver.save(*state(1))


def test_a_training_that_fails_still_keeps_its_last_state(slow):
    with pytest.raises(RuntimeError, match="the loss"), Saver(slow) as saver:
        saver.save(*state(1))
        threading.Timer(0.2, slow.go.set).start()
        raise RuntimeError("the loss")
    assert slow.latest()[0] == 1
