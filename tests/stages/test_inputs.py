"""A run goes on with what it was begun with, or says that it cannot."""

import pytest
import torch

import stp_ray as stp
from stp_ray.config import load_config
from stp_ray.data import describe
from stp_ray.errors import ConfigError
from stp_ray.models import build_model
from stp_ray.stages.inputs import INPUTS, inputs, require_same
from tests.stages.runs import minimal

pytestmark = pytest.mark.timeout(300)


def test_what_a_run_was_begun_with_is_asked_for_again(store):
    config = load_config(minimal())
    found = inputs(config, describe(config.data))
    assert found["weights"] is None
    require_same(store, found)
    store.write_json(INPUTS, found)
    require_same(store, found)
    with pytest.raises(ConfigError, match=r"begun with other images .*name=\.\.\."):
        require_same(store, {**found, "data": "0"})
    with pytest.raises(ConfigError, match="begun with other first weights"):
        require_same(store, {**found, "weights": "0"})


def test_a_run_does_not_go_on_with_other_weights_of_the_same_name(tmp_path):
    path = tmp_path / "first.pt"

    def save(seed):
        torch.manual_seed(seed)
        torch.save(build_model("resnet20", num_classes=10).state_dict(), path)

    save(0)
    config = load_config(minimal(model={"weights": str(path)}, storage=str(tmp_path / "runs")))
    stp.run(config, until="supernet")
    save(1)
    with pytest.raises(ConfigError, match="begun with other first weights"):
        stp.run(config)
    save(0)
    assert stp.run(config, until="supernet")
