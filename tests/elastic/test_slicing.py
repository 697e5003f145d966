"""Which part of which tensor a subnet keeps."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stp_ray.elastic import Subnet
from stp_ray.elastic.slicing import Layout, narrowed

from .networks import Written, supernet
from .same import assert_exact

segments = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.booleans()), min_size=1)


@given(segments, st.data())
def test_kept_ranges_are_the_prefix_of_every_part(parts, data):
    laid, start, widths, expected = [], 0, {}, []
    for i, (units, factor, elastic) in enumerate(parts):
        size = units * factor
        width = data.draw(st.integers(1, units)) if elastic else units
        if elastic:
            widths[f"axis{i}"] = width
        laid.append((start, size, f"axis{i}" if elastic else None, factor))
        expected += range(start, start + width * factor)
        start += size
    tensor = torch.arange(start * 2).view(start, 2)
    layout = Layout(tensors={"weight": (tuple(laid), None)})
    part = layout.cut("weight", tensor, Subnet(widths))
    assert part.tolist() == tensor[expected].tolist()
    if len(expected) == start:
        assert part is tensor
    else:
        kept = layout.ranges("weight", Subnet(widths))[0]
        assert [i for bounds in kept for i in range(*bounds)] == expected
        assert all(one[1] < other[0] for one, other in pairwise(kept))


def test_a_prefix_is_a_view_and_costs_no_copy():
    layout = Layout(tensors={"weight": (((0, 8, "a", 1),), ((0, 6, "b", 2),))})
    weight = torch.zeros(8, 6)
    part = layout.cut("weight", weight, Subnet({"a": 4, "b": 2}))
    assert part.shape == (4, 4)
    assert part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def test_a_step_on_views_warns_of_nothing():
    """PyTorch says what it has to say about them once in a process: this takes one of its own."""
    code = """
import torch
from stp_ray.elastic import Supernet
from stp_ray.models import resnet20
net = Supernet.trace(resnet20(), torch.rand(1, 3, 8, 8))
for _ in range(2):
    net(torch.rand(2, 3, 8, 8), net.space.smallest, direct=True).sum().backward()
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_narrowed_layer_leaves_the_whole_one_alone():
    whole = nn.ModuleDict(
        {"inner": nn.ModuleDict({"one": nn.Linear(4, 3), "two": nn.Linear(3, 2)})}
    )
    before = dict(whole.named_parameters())
    part = whole["inner"]["one"].weight[:2]
    small = narrowed(whole, {"inner.one.weight": part}, {"inner.one.out_features": 2, "mark": 1})
    assert small["inner"]["one"].weight is part
    assert (small["inner"]["one"].out_features, small.mark) == (2, 1)
    assert small["inner"]["two"] is whole["inner"]["two"]
    assert whole["inner"]["one"].out_features == 3 and not hasattr(whole, "mark")
    assert all(before[name] is p for name, p in whole.named_parameters())


def test_a_grouped_convolution_moves_in_whole_groups():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 1)
            self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
            self.after = nn.Conv2d(24, 12, 1)
            self.head = nn.Linear(12, 4)

        def forward(self, x):
            return self.head(self.after(self.grouped(self.stem(x))).relu().mean((2, 3)))

    net = supernet(Grouped())
    axis = net.space.axes[0]
    assert (axis.size, axis.unit, set(axis.layers)) == (4, "groups", {"stem", "grouped"})
    for groups in axis.choices:
        small = net.extract(Subnet({**net.space.full.widths, axis.name: groups}))
        assert small.stem.out_channels == small.grouped.in_channels == 4 * groups
        assert small.grouped.groups == groups
        assert small.grouped.out_channels == small.after.in_channels == 6 * groups
    assert_exact(net)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_depthwise_convolution_follows_its_input(multiplier):
    layer = nn.Conv2d(8, 8 * multiplier, 3, padding=1, groups=8)
    net = supernet(Written(lambda m, x: m.deep(x), 8 * multiplier, deep=layer))
    (axis,) = net.space.axes
    assert (axis.size, set(axis.layers)) == (8, {"stem", "deep"})
    assert_exact(net)


def test_a_concatenation_is_an_axis_for_every_part():
    def joined(m, x):
        return m.after(torch.cat([m.a(x), x, m.b(x), x], dim=1))

    layers = {
        "a": nn.Conv2d(8, 6, 1),
        "b": nn.Conv2d(8, 4, 1),
        "after": nn.Conv2d(26, 10, 3, padding=1),
    }
    net = supernet(Written(joined, 10, **layers))
    assert {(axis.name, axis.size) for axis in net.space.axes} == {
        ("stem", 8), ("a", 6), ("b", 4), ("after", 10),
    }  # fmt: skip
    subnet = Subnet({"stem": 3, "a": 2, "b": 1, "after": 10})
    assert net.slices(subnet)["after.weight"] == {1: ((0, 2), (6, 9), (14, 15), (18, 21))}
    assert_exact(net)


@pytest.mark.timeout(60)
def test_a_concatenation_with_the_image_and_a_frozen_part():
    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 4, 1)
            self.norm = nn.BatchNorm2d(13)
            self.c = nn.Conv2d(13, 8, 1)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = torch.cat([x, self.a(x).cumsum(1), self.b(x)], 1)
            return self.head(self.c(self.norm(x)).relu().mean((2, 3)))

    net = supernet(Image())
    assert {axis.name for axis in net.space.axes} == {"b", "c"}
    assert_exact(net)


def test_a_chunk_and_its_sibling_shrink_together():
    def gated(m, x):
        one, other = m.a(x).chunk(2, dim=1)
        return one * torch.sigmoid(other)

    net = supernet(Written(gated, 6, a=nn.Conv2d(8, 12, 1)))
    axis = next(axis for axis in net.space.axes if axis.name == "a")
    assert axis.size == 6
    subnet = Subnet({**net.space.full.widths, "a": 2})
    assert net.slices(subnet)["a.weight"] == {0: ((0, 2), (6, 8))}
    assert_exact(net)


@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: m.after(x.flatten(1)).view(-1, 8, 1, 1),
        lambda m, x: m.after(x.permute(0, 2, 3, 1).flatten(1)).view(-1, 8, 1, 1),
        lambda m, x: m.after(x.reshape(x.shape[0], -1))[:, :, None, None],
        lambda m, x: m.after(x.view(x.size(0), 8 * 16)).unsqueeze(-1).unsqueeze(-1),
        lambda m, x: m.after(torch.flatten(x, 1)).reshape([-1, 8, 1, 1]),
    ],
)
def test_a_flattened_image_keeps_its_pixels_together(between):
    def pooled(m, x):
        return between(m, F.avg_pool2d(x, 2))

    net = supernet(Written(pooled, after=nn.Linear(128, 8)))
    assert {axis.name for axis in net.space.axes} == {"stem", "after"}
    assert_exact(net)


@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(4, 8),
        nn.GroupNorm(4, 8, affine=False),
        nn.GroupNorm(1, 8),
        nn.BatchNorm2d(8),
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
    ],
)
def test_normalisation_follows_the_channels(norm):
    net = supernet(Written(lambda m, x: m.norm(x), norm=norm))
    assert_exact(net)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_normalisation_over_the_channels_follows_them(kind, options):
    if kind is nn.RMSNorm and "bias" in options:
        options = {}

    def last(m, x):
        return m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * 1.5

    net = supernet(Written(last, norm=kind(8, **options)))
    assert [axis.name for axis in net.space.axes] == ["stem"]
    assert_exact(net)
