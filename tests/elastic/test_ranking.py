"""Ranking moves units, never the output; slices after it keep the units with the best scores."""

import random
import re

import pytest
import torch
from torch import nn
from torchvision.models import swin_v2_t

from stp_ray.elastic import Supernet, importance
from stp_ray.models import build_model

from .networks import Own, Tokens, Written, pixels, randomised, supernet

NETWORKS = {
    "own": (Own, 8),
    "tokens": (Tokens, 8),
    "resnet20": (lambda: build_model("resnet20", num_classes=5), 8),
    "swin_v2_t": (lambda: swin_v2_t(num_classes=5), 64),
}


def random_scores(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {axis.name: torch.rand(axis.size, generator=generator) for axis in net.space.axes}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_any_order_leaves_the_output(name):
    build, size = NETWORKS[name]
    model = randomised(build().double(), pixels(8, size))
    images = pixels(2, size)
    net = Supernet.trace(model, images, divisor=1).eval()
    before = net(images)
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    net.rank(random_scores(net))
    assert any(not torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    assert float((net(images) - before).abs().max()) <= 1e-10 * float(before.abs().max())
    subnet = net.space.sample(random.Random(0))
    small = net.extract(subnet)
    assert float((net(images, subnet) - small(images)).abs().max()) <= 1e-10


@torch.no_grad()
def test_a_prefix_holds_the_units_with_the_best_scores():
    net = supernet(build_model("resnet20", num_classes=5))
    axis = next(axis for axis in net.space.axes if len(axis.layers) == 1)
    weight = net.model.get_submodule(axis.name).weight
    before = weight.clone()
    scores = torch.randperm(axis.size).double()
    net.rank({axis.name: scores})
    assert torch.equal(weight, before[scores.argsort(descending=True)])


@pytest.mark.parametrize("kind", ["l1", "l2", "norm", "taylor"])
def test_dead_units_score_lowest(kind):
    net = supernet(build_model("resnet20", num_classes=5))
    if kind == "taylor":
        net(pixels(4)).square().sum().backward()
    axis = next(axis for axis in net.space.axes if len(axis.layers) == 1)
    dead = [0, axis.size // 2]
    with torch.no_grad():
        for name, dims in net.segments.items():
            tensor = dict(net.model.named_parameters()).get(name)
            for dim, segments in enumerate(dims):
                if tensor is not None and segments and segments[0][2] == axis.name:
                    tensor.index_fill_(dim, torch.tensor(dead), 0)
    scores = importance(net, kind)
    assert set(scores) == {axis.name for axis in net.space.axes}
    assert set(scores[axis.name].argsort()[: len(dead)].tolist()) == set(dead)
    assert all(len(scores[a.name]) == a.size for a in net.space.axes)


@pytest.mark.parametrize("kind", ["l1", "l2", "norm", "taylor"])
def test_a_score_is_what_the_literature_says(kind):
    torch.manual_seed(0)
    conv, norm, head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 4)
    nn.init.normal_(norm.weight)
    pool = nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(conv, norm, nn.ReLU(), pool, nn.Flatten(), head).double()
    net = Supernet.trace(model, pixels(2), divisor=1)
    net(pixels(4)).square().sum().backward()
    conv, norm, head = (net.model.get_submodule(name) for name in ("0", "1", "5"))
    owned = [conv.weight.flatten(1), conv.bias[:, None], norm.weight[:, None], norm.bias[:, None]]
    owned.append(head.weight.T)
    given = [p.grad for p in (conv.weight, conv.bias, norm.weight, norm.bias, head.weight)]
    slopes = [given[0].flatten(1), *(g[:, None] for g in given[1:4]), given[4].T]
    wanted = {
        "l1": sum(part.abs().sum(1) for part in owned),
        "l2": sum(part.square().sum(1) for part in owned),
        "norm": norm.weight.abs(),
        "taylor": sum((p * g).abs().sum(1) for p, g in zip(owned, slopes, strict=True)),
    }
    (axis,) = net.space.axes
    torch.testing.assert_close(importance(net, kind)[axis.name], wanted[kind])


def test_ranked_slices_of_given_weights_lose_less():
    """Half of the units are worth nothing, at random places: ranked, a half-width slice is the
    whole network."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    ).double()  # fmt: skip
    with torch.no_grad():
        dead = torch.randperm(16)[:8]
        model[0].weight[dead] = 0
        model[0].bias[dead] = 0
    images = pixels(4)
    net = Supernet.trace(model, images, divisor=1)
    half = net.space.full
    half = type(half)({**half.widths, "0": 8})
    with torch.no_grad():
        whole = net(images)
        assert not torch.allclose(net(images, half), whole)
        net.rank(importance(net, "l2"))
        assert torch.allclose(net(images, half), whole)


def test_mistakes_are_named():
    net = supernet(build_model("resnet20", num_classes=5))
    with pytest.raises(ValueError, match="axis 'nowhere'"):
        net.rank({"nowhere": torch.ones(3)})
    axis = net.space.axes[0]
    for shape in ((3,), (axis.size, 1)):
        told = rf"have the shape {re.escape(str(list(shape)))}; expected \[{axis.size}\]"
        with pytest.raises(ValueError, match=told):
            net.rank({axis.name: torch.ones(shape)})
    with pytest.raises(ValueError, match="expected l1, l2, norm or taylor"):
        importance(net, "magic")
    with pytest.raises(ValueError, match=r"no gradient.*backward"):
        importance(net, "taylor")


def test_a_frozen_layer_counts_nothing_by_taylor():
    net = supernet(Written(lambda m, x: m.after(x), after=nn.Conv2d(8, 8, 1)))
    net.model.get_submodule("stem").requires_grad_(False)
    net(pixels(2)).sum().backward()
    reader = net.model.get_parameter("after.weight")
    expected = (reader * reader.grad).abs().sum((0, 2, 3)).detach()
    torch.testing.assert_close(importance(net, "taylor")["stem"], expected)


def test_a_buffer_that_is_put_in_order_too_is_in_the_state_dict():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
            self.register_buffer("table", torch.randn(1, 8, 1, 1), persistent=False)
            self.register_buffer("scale", torch.tensor(2.0), persistent=False)

        def forward(self, x):
            return self.head((self.scale * self.stem(x) + self.table).relu().mean((2, 3)))

    images, model = pixels(2), Positions().double()
    net, again = (Supernet.trace(model, images).eval() for _ in range(2))
    net.rank(random_scores(net))
    state = net.model.state_dict()
    assert "table" in state and "scale" not in state
    assert not torch.equal(state["table"], model.table)
    again.model.load_state_dict(state)
    torch.testing.assert_close(again(images), model.eval()(images))


def test_buffers_in_one_memory_are_put_in_order_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
            self.register_buffer("scale", torch.rand(8))
            self.register_buffer("of_images", self.scale.view(1, -1, 1, 1))

        def forward(self, x):
            return self.head((self.stem(x) * self.of_images).mean((2, 3)) * self.scale)

    images, model = pixels(2).float(), Twice().eval()  # `double()` would part them
    net = Supernet.trace(model, images).eval()
    net.rank(random_scores(net))
    torch.testing.assert_close(net(images), model(images))


def test_tensors_whose_elements_lie_in_one_place_are_put_in_order_too():
    class Expanded(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
            self.register_buffer("mask", torch.ones(1, 1, 1).expand(8, 1, 1))

        def forward(self, x):
            return self.head((self.stem(x) * self.mask).relu().mean((2, 3)))

    images, model = pixels(2), Expanded().double()
    net = Supernet.trace(model, images).eval()
    net.rank(random_scores(net))
    torch.testing.assert_close(net(images), model.eval()(images))
