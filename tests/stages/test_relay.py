"""What workers tell the driver."""

from types import SimpleNamespace

import pytest
import torch

from stp_ray.artifacts import Store
from stp_ray.config import load_config
from stp_ray.errors import RunError
from stp_ray.stages import finalize, supernet
from stp_ray.stages.jobs import RESULT
from stp_ray.stages.relay import Relay


def test_an_error_of_one_stage_is_not_that_of_another():
    relay, first = Relay(), RunError("the loss is not finite")
    assert relay.error() is None
    relay.fail("finalize/0.3", first)
    relay.fail("finalize/0.3", RunError("later"))
    relay.fail("finalize/0.15", RunError("another"))
    assert relay.error("finalize/0.5") is None
    assert relay.error("finalize/0.3") is first
    assert relay.error() is first, "the first of all"


class Actor:
    """A relay whose calls are answered at once."""

    def __init__(self):
        self._relay = Relay()

    def __getattr__(self, name):
        return SimpleNamespace(remote=getattr(self._relay, name))


def test_a_budget_that_fails_leaves_one_that_starts_after_it_alone(tmp_path, monkeypatch):
    """Both with workers of their own."""
    config = load_config({"storage": str(tmp_path), "budgets": [0.3, 0.5]})
    failing, other = (
        finalize._jobs(config, Store(tmp_path), label, "{}")[0] for label in ("0.3", "0.5")
    )

    def train(job, images, place, report):
        if job is failing:
            raise RunError("the loss is not finite")
        job.store.write_json(RESULT, {"seconds": 1.0})

    def trainer(job, images, workers, relay, folder):
        group = {"job": job, "images": images, "relay": relay, "shares": workers}

        def fit():
            try:
                supernet._worker(group)
            except RunError:
                supernet._worker(group)  # Ray starts the group again

        return SimpleNamespace(fit=fit)

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    for name, value in (
        ("train", train), ("_trainer", trainer), ("get_device", lambda: torch.device("cpu")),
    ):  # fmt: skip
        monkeypatch.setattr(supernet, name, value)
    monkeypatch.setattr(supernet.cluster, "require_resources", lambda *_: None)
    monkeypatch.setattr(supernet.ray, "get", lambda answer: answer)
    monkeypatch.setattr(supernet.ray.train, "get_context", lambda: context)
    relay, images = Actor(), SimpleNamespace(here=lambda: None)
    with pytest.raises(RunError, match="not finite"):
        supernet.fit_group(failing, images, 2, relay)
    assert supernet.fit_group(other, images, 2, relay) == {"seconds": 1.0}
