"""Which residual branches can be dropped, and what they are called."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stp_ray.elastic import Subnet, Supernet
from stp_ray.models import resnet20

from .networks import Attention, Bottle, Own, Tokens, Written, pixels, supernet
from .same import assert_exact


def convolutions(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Conv2d(8, 8, 3, padding=1) for name in names}


def blocks_of(net: Supernet) -> list[str]:
    return [block.name for block in net.space.blocks]


@pytest.mark.parametrize(
    ("between", "blocks"),
    [
        (lambda m, x: x + m.a(x), ["a"]),
        (lambda m, x: m.a(x) + x, ["a"]),
        (lambda m, x: torch.add(x, m.a(x)), ["a"]),
        (lambda m, x: x.add(m.a(x)), ["a"]),
        (lambda m, x: m.a(x).add_(x), ["a"]),
        (lambda m, x: F.relu(x + m.b(m.a(x).relu())), ["b"]),
        (lambda m, x: x + m.b(x + m.a(x)), ["a", "b"]),
        (lambda m, x: x + m.a(x) + m.b(x), ["a"]),
        (lambda m, x: x - m.a(x), []),
        (lambda m, x: x * m.a(x), []),
        (lambda m, x: m.a(x) + m.b(x), []),
        (lambda m, x: torch.add(x, m.a(x), alpha=2), []),
        (lambda m, x: x + x.relu(), []),
        (lambda m, x: x + x, []),
        (lambda m, x: x + m.a(x).mean((2, 3), keepdim=True), []),
        (lambda m, x: x + m.a(m.a(x)), []),
    ],
)
def test_branches_between_a_shortcut_and_an_addition(between, blocks):
    net = supernet(Written(between, **convolutions("a", "b")))
    assert blocks_of(net) == blocks
    assert_exact(net)


def dropped_out(m, x):
    for layer in (m.a, m.b):
        x = x + F.dropout(layer(x), 0.2, m.training)
    return x


def masked(m, x):
    for layer in (m.a, m.b):
        x = x + m.mask * layer(x * m.mask)
    return x


def with_sizes_read_before(m, x):
    sizes = batch, channels, height, width = x.shape
    x = x.flatten(2)
    for layer in (m.a, m.b):
        x = x + layer(x.view(batch, channels, height, width)).flatten(2)
    return x.view(*sizes)


@pytest.mark.parametrize("between", [dropped_out, masked, with_sizes_read_before])
def test_flags_buffers_and_sizes_tie_no_branches_together(between):
    model = Written(between, **convolutions("a", "b"))
    model.register_buffer("mask", torch.linspace(0.5, 1, 64).view(8, 8))
    net = supernet(model)
    assert blocks_of(net) == ["a", "b"]
    assert_exact(net, model=model)


def test_a_branch_that_something_else_reads_stays():
    def leaks(m, x):
        inside = m.a(x)
        return x + m.b(inside) + inside.mean()

    assert blocks_of(supernet(Written(leaks, **convolutions("a", "b")))) == []


def test_a_branch_that_reads_something_else_stays():
    def enters(m, x):
        other = m.b(x)
        x = other.relu()
        return x + m.a(x + other)

    assert blocks_of(supernet(Written(enters, **convolutions("a", "b")))) == []


def test_blocks_are_named_after_the_module_that_holds_them():
    assert blocks_of(supernet(Own())) == ["blocks.0", "blocks.1", "blocks.2"]
    assert blocks_of(supernet(Tokens())) == [
        f"layers.{i}.{part}" for i in range(2) for part in ("qkv", "fc1")
    ]
    names = blocks_of(Supernet.trace(resnet20(), torch.zeros(1, 3, 16, 16)))
    assert names == [
        *(f"layer1.{i}" for i in range(3)),
        *(f"layer{stage}.{i}" for stage in (2, 3) for i in (1, 2)),
    ]


def test_names_are_unique_whatever_the_model_looks_like():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x).relu()
            return x.mean((2, 3))

    names = blocks_of(Supernet.trace(Flat(), torch.zeros(1, 3, 4, 4)))
    assert len(names) == len(set(names)) == 3


def test_blocks_know_their_layers_and_the_axes_inside():
    net = supernet(Own())
    block = net.space.blocks[0]
    prefix = "blocks.0."
    assert {layer for layer in block.layers if layer.startswith(prefix)} == set(block.layers)
    assert block.axes == ("blocks.0.down",)
    attention, mlp = supernet(Tokens()).space.blocks[:2]
    assert (attention.axes, mlp.axes) == (("layers.0.qkv",), ("layers.0.fc1",))


def test_nested_branches_drop_alone_and_together():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.outer = nn.Sequential(nn.Conv2d(8, 8, 1), Bottle(8, 6), nn.Conv2d(8, 8, 1))
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.outer(x)
            return self.head(x.mean((2, 3)))

    net = supernet(Nested())
    inner, outer = "outer.1", "outer"
    assert set(blocks_of(net)) == {inner, outer}
    assert_exact(net)
    both = net.space.canonical(Subnet(net.space.full.widths, [inner, outer]))
    alone = net.space.canonical(Subnet(net.space.full.widths, [outer]))
    assert both == alone, "equal networks are equal subnets"
    assert both.dropped == {inner, outer}
    rng = random.Random(0)
    loose = Subnet(net.space.full.widths, [outer])
    assert loose.within(net.space.expand(loose, rng, 0.0))
    larger = [net.space.expand(both, rng, 0.5) for _ in range(20)]
    assert {frozenset(subnet.dropped) for subnet in larger} == {
        frozenset(dropped) for dropped in ([inner, outer], [inner], [])
    }
    assert net.cost(alone).params == 8 * 27 + 8 + 8 * 4 + 4


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_chain_of_blocks_can_be_dropped_whole(count):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.blocks = nn.Sequential(*(Bottle(8, 4) for _ in range(count)))
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    net = supernet(Chain()).eval()
    names = blocks_of(net)
    assert len(names) == count
    gone = net.space.canonical(Subnet(net.space.full.widths, names))
    with torch.no_grad():
        x = net.model.get_submodule("stem")(pixels(2))
        for _ in range(count):
            x = x.relu()
        torch.testing.assert_close(
            net(pixels(2), gone), net.model.get_submodule("head")(x.mean((2, 3)))
        )
    assert_exact(net)


def test_pre_normalised_layers_hold_two_blocks_each():
    net = supernet(
        nn.Sequential(nn.Conv2d(3, 16, 2, 2), nn.Flatten(2), Turned(), Attention(16, 4), Mean())
    )
    assert len(net.space.blocks) == 2
    assert_exact(net)


class Turned(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(x.mean(1))


def test_the_layers_of_a_block_are_named_in_the_order_in_which_they_run():
    net = Supernet.trace(resnet20(), torch.zeros(1, 3, 16, 16))
    layers = {block.name: block.layers for block in net.space.blocks}
    assert layers["layer1.1"] == tuple(f"layer1.1.{at}" for at in ("conv1", "bn1", "conv2", "bn2"))
