"""The rules of operations: what they let through, and what they freeze."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stp_ray.elastic import Supernet

from .networks import Written, line_of, pixels, supernet
from .same import assert_exact, counted_macs, subnets_of


def test_an_operation_without_a_rule_freezes_what_reaches_it_and_says_where():
    class Cumulative(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(3, 8, 3)
            self.two = nn.Conv2d(8, 8, 3)
            self.three = nn.Conv2d(8, 12, 1)
            self.head = nn.Linear(12, 4)

        def forward(self, x):
            x = self.two(self.one(x).relu())
            x = torch.cumsum(x, dim=1)  # couples the channels
            return self.head(self.three(x).relu().mean((2, 3)))

    net = supernet(Cumulative())
    (frozen,) = net.frozen
    assert (frozen.name, frozen.size) == ("two", 8)
    line = line_of(__file__, "torch.cumsum(x, dim=1)  #")
    assert f"no rule for cumsum: cumsum at test_ops.py:{line}" in frozen.reason
    assert "x = torch.cumsum(x, dim=1)" in frozen.reason
    assert {axis.name for axis in net.space.axes} == {"one", "three"}
    assert_exact(net)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), "no rule for InstanceNorm2d"),
        (nn.ConvTranspose2d(8, 8, 2), "no rule for ConvTranspose2d"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), "ParametrizedConv2d"),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)), "ParametrizedConv2d"),
        (nn.LocalResponseNorm(3), "no rule for LocalResponseNorm"),
    ],
)
def test_a_layer_without_a_rule_is_kept_whole(layer, words):
    after = nn.Conv2d(8, 12, 1)
    net = supernet(Written(lambda m, x: m.after(m.layer(x)), 12, layer=layer, after=after))
    assert [frozen.name for frozen in net.frozen] == ["stem"]
    assert words in net.frozen[0].reason
    assert [axis.name for axis in net.space.axes] == ["after"]
    assert_exact(net)


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (lambda m, x: x.softmax(dim=1), "normalises over an elastic dimension"),
        (lambda m, x: x[:, :4].repeat(1, 2, 1, 1), "index into an elastic dimension"),
        (lambda m, x: F.pad(x[:, 1:], (0, 0, 0, 0, 1, 0)), "index into an elastic dimension"),
        (lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 0))[:, :8], "padding of an elastic dimension"),
        (lambda m, x: x * (x.size(1) // 2) ** -0.5, "computes with the size"),
        (lambda m, x: x.reshape(-1, 1, 8, 8).reshape(-1, 8, 8, 8), "with the batch"),
        (lambda m, x: x.roll(1, dims=1), "no rule for roll"),
        (lambda m, x: x * x.abs().amax(), "no rule for amax"),
        (lambda m, x: x * x.abs().mean(), "reduces over everything"),
    ],
)
def test_what_is_not_understood_is_frozen_and_runs_right(between, words):
    net = supernet(Written(lambda m, x: m.after(between(m, x)), 12, after=nn.Conv2d(8, 12, 1)))
    assert [axis.name for axis in net.space.axes] == ["after"]
    assert [frozen.name for frozen in net.frozen] == ["stem"]
    assert words in net.frozen[0].reason
    assert_exact(net)


def _filtered(shape):
    """Sigmoid of the module's convolution over a view of [B, 8, 8, 8], as a factor of one number
    for each image."""

    def between(m, x):
        tokens = x.flatten(2).transpose(1, 2)  # [B, 64, 8]
        views = {"tokens": tokens, "plane": tokens.unsqueeze(1), "volume": x.unsqueeze(1)}
        out = m.filter(views[shape]).sigmoid()
        return x * out.flatten(1).mean(1)[:, None, None, None]

    return between


@pytest.mark.parametrize(
    ("shape", "layer"),
    [
        ("tokens", nn.Conv1d(64, 6, 3, padding=1)),
        ("plane", nn.Conv2d(1, 6, 3, padding=1)),
        ("volume", nn.Conv3d(1, 6, 3, padding=1)),
    ],
)
def test_channels_that_a_convolution_slides_over_stay_whole(shape, layer):
    model = Written(_filtered(shape), filter=layer)
    net = supernet(model)
    assert [axis.name for axis in net.space.axes] == ["filter"]
    (frozen,) = net.frozen
    assert (frozen.name, frozen.size) == ("stem", 8)
    assert "convolves over an elastic dimension: filter at test_ops.py" in frozen.reason
    assert_exact(net, model=model)


@pytest.mark.parametrize("batched_first", [True, False])
@torch.no_grad()
def test_a_convolution_of_an_image_of_the_models_own_stays_whole(batched_first):
    def between(m, x):
        if batched_first:
            return m.layer(x) * m.layer(m.image).mean()
        return m.layer(m.image).mean() * m.layer(x)

    image = nn.Parameter(torch.randn(8, 4, 4))
    net = supernet(Written(between, layer=nn.Conv2d(8, 8, 1), image=image))
    assert not any({"stem", "layer"} & set(axis.layers) for axis in net.space.axes)
    params = sum(p.numel() for p in net.parameters())
    assert (counted_macs(net.model, pixels(1))[1], params) == (net.cost().macs, net.cost().params)


@torch.no_grad()
def test_a_convolution_of_a_bank_of_kernels_keeps_their_number():
    def between(m, x):
        return x * m.layer(m.bank).mean((1, 2, 3))[:, None, None]

    bank = nn.Parameter(torch.randn(8, 3, 4, 4))
    net = supernet(Written(between, layer=nn.Conv2d(3, 6, 1), bank=bank))
    assert [axis.name for axis in net.space.axes] == ["layer"]
    for subnet in subnets_of(net, 3):
        assert counted_macs(net.extract(subnet), pixels(1))[1] == net.cost(subnet).macs


def test_patches_of_an_elastic_height_keep_it_whole():
    from torchvision.models.swin_transformer import PatchMerging

    def between(m, x):
        rows = m.rows(x.transpose(2, 3)).transpose(2, 3)  # another height
        return m.merge(rows.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    net = supernet(Written(between, 16, rows=nn.Linear(8, 8), merge=PatchMerging(8)))
    assert {axis.name for axis in net.space.axes} == {"stem", "merge.reduction"}
    assert "merges patches of an elastic dimension" in net.frozen[0].reason
    assert_exact(net)


def test_a_constant_of_the_models_own_is_cut_with_the_channels():
    model = Written(lambda m, x: x + torch.linspace(0, 1, 8).double().view(8, 1, 1))
    net = supernet(model)
    assert [axis.name for axis in net.space.axes] == ["stem"]
    assert_exact(net, model=model)


def test_sizes_computed_from_elastic_ones_are_those_of_the_full_network():
    class Heads(nn.Module):
        """Attention whose head size is read off the embedding."""

        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 2, 2)
            self.qkv = nn.Linear(16, 48)
            self.proj = nn.Linear(16, 16)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            x = self.stem(x).flatten(2).transpose(1, 2)
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).chunk(3)
            x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
            return self.head(self.proj(x.squeeze(0).transpose(1, 2).reshape(b, n, c)).mean(1))

    net = supernet(Heads())
    units = {axis.name: (axis.size, axis.unit) for axis in net.space.axes}
    assert units == {"stem": (16, "channels"), "qkv": (4, "heads"), "proj": (16, "channels")}
    assert_exact(net)


@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: nn.functional.normalize(x, dim=1) * x.abs().sum(1, keepdim=True),
        lambda m, x: x * x.mean((2, 3), keepdim=True).repeat(1, 1, 8, 8),
        lambda m, x: m.places.repeat(x.shape[0], 1, 1, 1) + x,
        lambda m, x: m.one_group(x),
        lambda m, x: (x.flatten(2).transpose(1, 2) @ m.weight).transpose(1, 2).view(-1, 8, 8, 8),
        lambda m, x: torch.matmul(x.mean((2, 3)), m.weight)[:, :, None, None] * x,
        lambda m, x: m.standardised(x),
        lambda m, x: m.slope(m.slopes(x)),
        lambda m, x: F.glu(m.twice(x), dim=1) + m.halves(m.twice(x)),
    ],
    ids=[
        "normalize", "repeat", "places", "one group", "weight", "a flat weight", "standardised",
        "PReLU", "GLU",
    ],
)  # fmt: skip
def test_what_is_understood_is_elastic_and_exact(between):
    from timm.layers import ScaledStdConv2d

    layers = {
        "places": nn.Parameter(torch.randn(1, 8, 8, 8)),
        "weight": nn.Parameter(torch.randn(8, 8)),
        "one_group": nn.GroupNorm(1, 8),
        "standardised": ScaledStdConv2d(8, 8, 3, padding=1),
        "slope": nn.PReLU(),
        "slopes": nn.PReLU(8),
        "twice": nn.Conv2d(8, 16, 1),
        "halves": nn.GLU(1),
        "after": nn.Conv2d(8, 12, 1),
    }
    model = Written(lambda m, x: m.after(between(m, x).relu()), 12, **layers)
    net = supernet(model)
    assert net.frozen == ()
    assert {"stem", "after"} <= {layer for axis in net.space.axes for layer in axis.layers}
    assert_exact(net, model=model)


class SequenceFirst(nn.Module):
    """Attention over [tokens, batch, width], as torch's own is written: the heads share a dimension
    with the batch."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).flatten(2).permute(2, 0, 1)
        t, b, c = x.shape

        def heads(part):
            return part.reshape(t, b * 2, c // 2).transpose(0, 1)

        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mixed = (heads(q) @ heads(k).transpose(-2, -1)).softmax(-1) @ heads(v)
        return self.head((x + self.proj(mixed.transpose(0, 1).reshape(t, b, c))).mean(0))


@pytest.mark.parametrize("size", [15, 21])
def test_the_batch_is_told_from_any_number_of_tokens(size):
    """8 x 8 of them, or 11 x 11, which the shape pass's first choice of a batch divides."""
    model = SequenceFirst()
    net = supernet(model, size)
    assert [axis.name for axis in net.space.axes] == ["stem"]
    (frozen,) = net.frozen
    assert frozen.name == "qkv" and "with the batch" in frozen.reason
    assert_exact(net, size, model=model)


@pytest.mark.parametrize("size", [15, 21])
def test_pixels_are_not_taken_for_the_batch(size):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, 2, 1)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.stem(x)
            b, c, h, w = x.shape
            return self.head(x.flatten(1).relu().reshape(b, c, h, w).mean((2, 3)))

    model = Flat()
    net = supernet(model, size)
    assert net.frozen == () and [axis.name for axis in net.space.axes] == ["stem"]
    assert_exact(net, size, model=model)


def test_the_batch_is_found_where_it_is_merged_with_another_dimension():
    class Split(nn.Module):
        """Each token as two of half its width, then as four."""

        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 2, 2)
            self.two = nn.Linear(8, 16)
            self.four = nn.Linear(8, 8)
            self.out = nn.Linear(32, 16)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            x = self.stem(x).flatten(2).permute(2, 0, 1)
            t, b, _ = x.shape
            x = self.two(x.reshape(t, b * 2, 8)).relu()
            x = self.four(x.reshape(t, b * 4, 8))
            return self.head(self.out(x.reshape(t, b, 32)).mean(0))

    model = Split()
    net = supernet(model)
    assert [axis.name for axis in net.space.axes] == ["out"]
    assert [frozen.name for frozen in net.frozen] == ["stem", "two", "four"]
    assert all("with the batch" in frozen.reason for frozen in net.frozen)
    assert_exact(net, model=model)


def test_channels_shuffled_between_groups():
    def shuffle(m, x):
        b, c, h, w = x.shape
        return m.after(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))

    net = supernet(Written(shuffle, 12, after=nn.Conv2d(8, 12, 1)))
    assert {axis.name for axis in net.space.axes} == {"stem", "after"}
    assert_exact(net)


class Gained(nn.Conv2d):
    """Weights that its forward pass scales."""

    def __init__(self):
        super().__init__(8, 8, 1)
        self.gain = nn.Parameter(torch.rand(8, 1, 1, 1))

    def _conv_forward(self, images, weight, bias):
        return super()._conv_forward(images, weight * self.gain, bias)


def hooked():
    layer, gate = nn.Conv2d(8, 8, 1), torch.rand(8, 1, 1)
    layer.register_forward_hook(lambda module, given, out: out * gate)
    return layer


def rewritten():
    layer, gate = nn.Conv2d(8, 8, 1), torch.rand(8, 1, 1)
    layer.forward = lambda images: nn.Conv2d.forward(layer, images) * gate
    return layer


@pytest.mark.parametrize("layer", [Gained, hooked, rewritten])
def test_a_layer_that_does_more_than_its_class_stays_whole(layer):
    model = Written(lambda m, x: m.a(x).relu(), a=layer())
    net = supernet(model)
    assert not any("a" in axis.layers for axis in net.space.axes)
    assert_exact(net, model=model)


def test_a_frozen_layer_of_a_sequential_names_no_line_of_whoever_traces_it():
    layers = [nn.Conv2d(3, 8, 1), nn.LocalResponseNorm(3), nn.Flatten(), nn.Linear(512, 4)]
    (frozen,) = Supernet.trace(nn.Sequential(*layers), torch.zeros(1, 3, 8, 8)).frozen
    assert frozen.reason.endswith("no rule for LocalResponseNorm: 1")


@pytest.mark.parametrize("unbatched", [False, True])
def test_a_pool_that_reaches_the_channels_freezes_them(unbatched):
    def over_pixels_and_channels(m, x):
        return m.pool(x)

    def over_channels(m, x):
        return m.pool(x.mean((2, 3)))[:, :, None, None]

    pool = nn.AvgPool1d(3, 1, 1) if unbatched else nn.MaxPool3d(3, 1, 1)
    model = Written(over_channels if unbatched else over_pixels_and_channels, pool=pool)
    net = supernet(model)
    assert [(f.name, f.reason.split(":")[0]) for f in net.frozen] == [
        ("stem", "works across an elastic dimension")
    ]
    assert_exact(net, model=model)


def test_groups_are_counted_as_groups():
    net = supernet(Written(lambda m, x: m.norm(x), norm=nn.GroupNorm(4, 8)))
    (axis,) = (axis for axis in net.space.axes if "stem" in axis.layers)
    assert (axis.size, axis.unit) == (4, "groups")
    kept = Supernet.trace(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(288, 4)),
        torch.zeros(1, 3, 8, 8), min_ratio=0.6,
    )  # fmt: skip
    assert [(f.name, f.size) for f in kept.frozen] == [("0", 8)]


def test_squeeze_and_excitation_by_expand_as_and_a_comparison_are_elastic():
    def gated(m, x):
        gate = m.up(m.down(x.mean((2, 3))).relu()).sigmoid().view(x.size(0), x.size(1), 1, 1)
        x = x * gate.expand_as(x)
        return torch.where((x > 0) & (x != 1), x, 0.1 * x)

    net = supernet(Written(gated, 8, down=nn.Linear(8, 4), up=nn.Linear(4, 8)))
    assert not net.frozen
    assert {layer for axis in net.space.axes for layer in axis.layers} == {"stem", "down", "up"}
    assert_exact(net)
