"""A subnet is an argument: what running one reads, writes and learns."""

import copy
import io
import random
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from stp_ray.elastic import Cost, Frozen, StatsRecorder, Subnet, Supernet

from .networks import Own, Tokens, Written, pixels, supernet


def middle(net: Supernet) -> Subnet:
    """Half of every width, the first block dropped."""
    drop = [block.name for block in net.space.blocks[:1]]
    return net.space.canonical(Subnet(net.space.uniform(0.5).widths, drop))


def state_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def assert_state(net: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [Own, Tokens])
def test_running_a_subnet_leaves_nothing_behind(build, training):
    net = supernet(build()).train(training)
    before, modes = state_of(net), [module.training for module in net.modules()]
    subnets = [net.space.sample(random.Random(seed)) for seed in range(4)]
    for subnet in [*subnets, middle(net), net.space.full]:
        net(pixels(4), subnet)
    assert_state(net, before)
    assert [module.training for module in net.modules()] == modes


class FunctionalNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.variance, training=self.training)


@pytest.mark.parametrize(
    "layer",
    [
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
        FunctionalNorm(),
        nn.BatchNorm2d(8, momentum=None),
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)),
    ],
)
def test_no_layer_writes_its_statistics_for_a_subnet(layer):
    after = nn.Conv2d(8, 6, 1)
    net = supernet(Written(lambda m, x: m.after(m.layer(x)), 6, layer=layer, after=after))
    net.train()
    before = state_of(net)
    for subnet in (net.space.uniform(0.5), net.space.full):
        net(pixels(4), subnet)
    assert_state(net, before)
    small = net.extract(net.space.uniform(0.5))
    torch.testing.assert_close(net(pixels(4), net.space.uniform(0.5)), small(pixels(4)))
    net(pixels(4))  # the main network does write
    changed = any(not torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert changed == any(True for _ in net.buffers())


def test_the_main_network_trains_like_the_model():
    model = Own().double().train()
    net = Supernet.trace(model, pixels(1))
    for _ in range(2):
        torch.manual_seed(1)
        one = net(pixels(4))
        torch.manual_seed(1)
        assert torch.equal(one, model(pixels(4)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(net.model.state_dict()[name], tensor), name


def test_dropped_weights_do_not_matter():
    net = supernet(Own()).eval()
    subnet = middle(net)
    with torch.no_grad():
        before = net(pixels(2), subnet)
        for name, parameter in net.model.named_parameters():
            kept = torch.ones_like(parameter, dtype=torch.bool)
            for dim, ranges in net.slices(subnet).get(name, {}).items():
                inside = torch.zeros(parameter.shape[dim], dtype=torch.bool)
                for start, stop in ranges:
                    inside[start:stop] = True
                shape = [1] * parameter.dim()
                shape[dim] = -1
                kept &= inside.view(shape)
            parameter[~kept] = float("nan")
        for layer in net.space.blocks[0].layers:
            for parameter in net.model.get_submodule(layer).parameters():
                parameter.fill_(float("nan"))
        assert torch.equal(net(pixels(2), subnet), before)
        assert not net(pixels(2)).isfinite().any()


def test_a_subnet_sees_the_weights_as_they_are_now():
    net = supernet(Own()).eval()
    subnet = middle(net)
    before = net(pixels(2), subnet)
    with torch.no_grad():
        net.model.get_parameter("head.bias").add_(1.0)
    torch.testing.assert_close(net(pixels(2), subnet), before + 1.0)


def test_gradients_of_several_subnets_add_up():
    net = supernet(Own()).eval()
    subnets = [middle(net), net.space.uniform(0.5), net.space.full]
    alone = []
    for subnet in subnets:
        net.zero_grad()
        net(pixels(2), subnet).square().sum().backward()
        alone.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    net.zero_grad()
    sum(net(pixels(2), subnet).square().sum() for subnet in subnets).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, sum(grads.get(name, 0) for grads in alone))


@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: F.dropout(x, 0.5, training=m.training),
        lambda m, x: F.dropout(x, 0.5, m.training),
        lambda m, x: m.drop(x),
        lambda m, x: x + m.path(x),
    ],
)
def test_randomness_follows_the_mode(between):
    layers = {"drop": nn.Dropout(0.5), "path": StochasticDepth(0.5, "row")}
    net = supernet(Written(between, **layers))
    for subnet in (None, net.space.uniform(0.5)):
        module = net if subnet is None else net.extract(subnet)
        calls = [lambda images, subnet=subnet: net(images, subnet), module]
        for call in calls:
            net.train()
            module.train()
            torch.manual_seed(0)
            one, other = call(pixels(8)), call(pixels(8))
            assert not torch.equal(one, other)
            net.eval()
            module.eval()
            one, other = call(pixels(8)), call(pixels(8))
            assert torch.equal(one, other)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_model(training):
    net = Supernet.trace(Own().train(training), torch.zeros(1, 3, 8, 8))
    assert {module.training for module in net.modules()} == {training}
    assert net.extract(net.space.full).training is training


@pytest.mark.parametrize("build", [Own, Tokens])
def test_a_copy_runs_on_its_own(build):
    net = supernet(build()).eval()
    other = copy.deepcopy(net)
    subnet = middle(net)
    with torch.no_grad():
        for argument in (None, subnet):
            assert torch.equal(net(pixels(2), argument), other(pixels(2), argument))
        assert torch.equal(net.extract(subnet)(pixels(2)), other.extract(subnet)(pixels(2)))
        assert net.cost(subnet) == other.cost(subnet)
        before = net(pixels(2), subnet)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(net(pixels(2), subnet), before)


def test_statistics_are_an_argument():
    net = supernet(Own()).eval()
    subnet = net.space.uniform(0.5)
    before = state_of(net)
    recorder = StatsRecorder()
    with torch.no_grad():
        net(pixels(8), subnet, stats=recorder)
        stats = recorder.stats()
        out = net(pixels(2), subnet, stats=stats)
        assert not torch.allclose(out, net(pixels(2), subnet))
        assert_state(net, before)
        for found in stats.values():
            found["running_var"].fill_(1e6)
        assert not torch.allclose(out, net(pixels(2), subnet, stats=stats))
        torch.testing.assert_close(out, net(pixels(2), subnet, stats=recorder.stats()))
    norms = {n for n, m in net.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert set(stats) == norms
    assert stats["bn"]["running_mean"].shape == (
        net.extract(subnet).get_submodule("bn").weight.shape
    )


def test_only_the_state_of_the_original_is_kept():
    model = Own()
    net = Supernet.trace(model, torch.zeros(1, 3, 8, 8))
    assert set(net.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    assert [n for n, _ in net.model.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_a_subnet_of_another_space_is_refused():
    net = supernet(Own())
    with pytest.raises(ValueError, match="names other axes"):
        net(pixels(1), Subnet({"other": 8}))
    with pytest.raises(ValueError, match="names other axes"):
        net.extract(Subnet({}))


def test_it_describes_itself():
    net = supernet(Own())
    assert "droppable blocks" in repr(net) and "0 frozen layers" in repr(net)


def cells(html: str) -> list[list[str]]:
    """The rows of every table in HTML, which has to be well-formed."""
    tree = ElementTree.fromstring(f"<div>{html}</div>")
    return [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]


def test_a_notebook_shows_axes_costs_and_what_is_frozen():
    net = supernet(Own())
    net.frozen = (Frozen("<odd>", 8, "a & b"),)
    shown, full, least = cells(net._repr_html_()), net.cost(), net.cost(net.space.smallest)
    assert ["main network", f"{full.macs:,}", f"{full.params:,}"] in shown
    assert ["smallest subnet", f"{least.macs:,}", f"{least.params:,}"] in shown
    for axis in net.space.axes:
        sizes = [str(n) for n in (axis.choices[0], axis.size, len(axis.choices))]
        assert [axis.name, axis.unit, *sizes] in shown
    assert ["<odd>", "8", "a & b"] in shown
    assert all([block.name, str(len(block.layers))] in shown for block in net.space.blocks)


def test_a_notebook_shows_a_subnet_and_its_cost():
    subnet = Subnet({"a": 4, "b<i>": 2048}, ["block"])
    assert repr(subnet) == f"Subnet({subnet.id}: 2 widths, without block)"
    assert cells(subnet._repr_html_()) == [["axis", "width"], ["a", "4"], ["b<i>", "2,048"]]
    shown = cells(Cost(macs=1000, params=20, latency_s=0.0025)._repr_html_())
    assert shown[1:] == [
        ["MACs of one sample", "1,000"],
        ["parameters", "20"],
        ["latency, ms", "2.50"],
    ]


def test_a_deep_network_is_copied():
    """Its chain of layers is longer than Python's stack."""
    layers = [layer for _ in range(300) for layer in (nn.Conv2d(8, 8, 1), nn.Tanh())]

    def between(m, x):
        batch, channels, height, width = x.shape
        return m.chain(x).view(batch, channels, height * width).view(batch, channels, height, width)

    net = supernet(Written(between, chain=nn.Sequential(*layers)))
    other = copy.deepcopy(net)
    half = net.space.uniform(0.5)
    net.eval(), other.eval()
    assert torch.equal(other(pixels(2), half), net(pixels(2), half))
    assert torch.equal(other.extract(half)(pixels(2)), net(pixels(2), half))


def test_a_supernet_that_is_saved_says_what_to_save():
    net, stored = supernet(Own()).eval(), io.BytesIO()
    with pytest.raises(TypeError, match=r"save net\.model\.state_dict\(\)"):
        torch.save(net, io.BytesIO())
    torch.save(net.model, stored)  # the main network alone is a module like others
    stored.seek(0)
    assert torch.equal(torch.load(stored, weights_only=False)(pixels(2)), net(pixels(2)))


def test_misuse_is_told():
    net = supernet(Own())
    space, rng = net.space, random.Random(0)
    for wrong in (
        lambda: net(pixels(2), "subnet"),
        lambda: net.extract(None),
        lambda: net.cost(0.5),
        lambda: space.crossover(space.smallest, "subnet", rng),
    ):
        with pytest.raises(ValueError, match="expected a Subnet"):
            wrong()
    with pytest.raises(ValueError, match="names other axes"):
        space.cost(Subnet({"elsewhere": 1}))
    with pytest.raises(ValueError, match=r"budget is 0\.5; expected a Budget"):
        space.fill(space.smallest, 0.5)
    with pytest.raises(ValueError, match=r"rng is 0; expected a random\.Random"):
        space.sample(0)
    with pytest.raises(ValueError, match="ratio is 'half'"):
        space.uniform("half")
