"""A run goes on with what it was begun with, or says that it cannot."""

import pytest
import torch
from torch import nn

import stp_ray as stp
from stp_ray.config import load_config
from stp_ray.data import describe
from stp_ray.errors import ConfigError
from stp_ray.models import build_model
from stp_ray.stages.inputs import INPUTS, inputs, require_same
from stp_ray.stages.network import build_supernet
from tests.stages.runs import minimal

pytestmark = pytest.mark.timeout(300)


def test_what_a_run_was_begun_with_is_asked_for_again(store):
    config = load_config(minimal())
    summary = describe(config.data)
    found = inputs(config, summary, build_supernet(config, summary))
    assert found["weights"] is None
    assert found["network"] is None  # ours and torchvision's may differ between versions
    require_same(store, found)
    store.write_json(INPUTS, found)
    require_same(store, found)
    with pytest.raises(ConfigError, match=r"begun with other images .*name=\.\.\."):
        require_same(store, {**found, "data": "0"})
    with pytest.raises(ConfigError, match="begun with other first weights"):
        require_same(store, {**found, "weights": "0"})
    with pytest.raises(ConfigError, match="begun with other code of the network"):
        require_same(store, {**found, "network": "0"})
    del found["network"]
    store.write_json(INPUTS, found)  # as an earlier version did
    require_same(store, {**found, "network": "0"})


#: What a user's own code builds, and may be changed to between two attempts.
OWN = {"width": 8, "act": nn.ReLU, "eps": 1e-5}


def own(num_classes):
    width = OWN["width"]
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width, eps=OWN["eps"]), OWN["act"](),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes),
    )  # fmt: skip


def test_a_run_does_not_go_on_with_other_code_of_the_network(tmp_path, monkeypatch):
    recipe = minimal(model={"name": f"{__name__}:own"}, storage=str(tmp_path / "runs"))
    config = load_config(recipe)
    stp.run(config, until="supernet")
    for name, value in (("width", 16), ("act", nn.Sigmoid), ("eps", 1e-3)):
        with monkeypatch.context() as patch:
            patch.setitem(OWN, name, value)
            with pytest.raises(ConfigError, match="begun with other code of the network"):
                stp.run(config)
    assert stp.run(config, until="supernet")


class Told(nn.BatchNorm2d):
    """A layer with an object that shows its address, and a state that is no tensor."""

    def extra_repr(self):
        return repr(object())

    def get_extra_state(self):
        return {"any": "thing"}


def attending(num_classes, heads=2, eps=1e-5, frozen=False):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 2, stride=2), Told(8, eps=eps)
            self.attention = nn.MultiheadAttention(8, heads, batch_first=True)
            self.head = nn.Linear(8, num_classes).requires_grad_(not frozen)

        def forward(self, x):
            x = self.norm(self.stem(x)).flatten(2).transpose(1, 2)
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    return Attending()


def test_a_network_is_known_by_what_its_layers_were_made_with():
    def digest(**kwargs):
        config = load_config(minimal(model={"name": f"{__name__}:attending", "kwargs": kwargs}))
        summary = describe(config.data)
        return inputs(config, summary, build_supernet(config, summary))["network"]

    assert digest() == digest()
    changed = [digest(**change) for change in ({"heads": 4}, {"eps": 1e-3}, {"frozen": True})]
    assert len({digest(), *changed}) == 4


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode])
def test_a_run_learns_whatever_its_caller_is_in(tmp_path, surroundings):
    with surroundings():
        figures = stp.run(minimal(storage=str(tmp_path / "runs")), until="supernet")
    assert figures


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
