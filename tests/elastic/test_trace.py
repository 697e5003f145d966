"""What tracing takes, what it freezes, and what it refuses."""

import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, swin_t

from stp_ray.elastic import Subnet, Supernet
from stp_ray.errors import TraceError
from stp_ray.models import build_model

from .networks import Own, Written, pixels, randomised, supernet
from .same import assert_exact


def line_of(text: str) -> int:
    """Where this file says `text` for the first time."""
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, start=1) if text in line)


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
    line = line_of("torch.cumsum(x, dim=1)  #")
    assert f"no rule for cumsum: cumsum at test_trace.py:{line}" in frozen.reason
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
    assert "convolves over an elastic dimension: filter at test_trace.py" in frozen.reason
    assert_exact(net, model=model)


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


@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: m.after(F.relu(x, inplace=True)) + x,
        lambda m, x: m.after(F.relu(x, True)) + x,
        lambda m, x: m.after(m.act(x)) + x,
        lambda m, x: m.after(x.relu_()) + x,
        lambda m, x: m.after(F.relu_(x)) + x,
        lambda m, x: m.after(x.mul_(2).add_(1)) * x,
        lambda m, x: (x.relu_(), m.after(x))[1],
        lambda m, x: m.after(x).add_(x).div_(3),
        lambda m, x: _assign(m, x),
    ],
)
def test_operations_in_place_compute_what_they_did(between):
    """Whoever reads a tensor after it was changed in place reads what it was changed to."""
    layers = {"after": nn.Conv2d(8, 8, 3, padding=1), "act": nn.ReLU(inplace=True)}
    model = randomised(Written(between, **layers).double(), pixels(8))
    net = Supernet.trace(model, pixels(1))
    assert net.frozen == ()
    assert_exact(net, model=model)


def _assign(m, x):
    y = m.after(x)
    y += x
    z = y
    z /= 2
    return z + y


@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: x.flatten(2).relu_().mean(2)[:, :, None, None] + x,
        lambda m, x: m.scale.mul_(2) * x,
        lambda m, x: x.clone().zero_() + x,
    ],
)
def test_in_place_operations_that_cannot_be_followed_are_refused(between):
    model = Written(between, scale=nn.Parameter(torch.ones(8, 1, 1), requires_grad=False))
    with pytest.raises(TraceError, match=r"at test_trace\.py:\d+ .*in place.*expected") as caught:
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))
    assert "\n" not in str(caught.value)


def test_control_flow_on_values_names_the_module_and_the_line():
    class Inner(nn.Module):
        def forward(self, x):
            if x.sum() > 0:  # depends on values
                return x
            return -x

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Inner(), nn.Flatten(), nn.Linear(288, 4))
    with pytest.raises(TraceError) as caught:
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))
    message = str(caught.value)
    line = line_of("if x.sum() > 0:  # depends")
    assert f"module '1' at test_trace.py:{line} `if x.sum() > 0:" in message
    assert "control flow" in message and "\n" not in message
    assert caught.value.exit_code == 2


class Modes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        if self.training:
            x = x * 2
        return self.head(x)


def failing(message):
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError(message)

    return Failing()


class Two(nn.Module):
    def forward(self, x, y):
        return x + y


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Modes(), "different operations in training and evaluation mode, first at"),
        (failing("first\nsecond"), "first; expected"),
        (failing(""), "RuntimeError; expected"),
        (Two(), "missing 1 required positional argument: 'y'"),
        (nn.Sequential(nn.Conv2d(4, 8, 3)), r"fails on images \[\d+, 3, 8, 8\]"),
        (nn.Sequential(nn.Flatten(), nn.Linear(10, 2)), "fails on images"),
    ],
)
def test_models_that_cannot_be_traced_say_why_in_one_line(model, words):
    with pytest.raises(TraceError, match=words) as caught:
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))
    assert "\n" not in str(caught.value)


def without_gradients(m, x):
    with torch.no_grad():
        return m.a(x)


def in_half_precision(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.a(x)


def by_a_coin(draw):
    return lambda m, x: x if m.training and draw() < 0.5 else x + m.a(x)


def counting(m, x):
    m.count.add_(1)
    return m.a(x) * m.count


def with_a_hidden_parameter(m, x):
    return m.a(x) * (m.hidden[0] * 2)


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (without_gradients, r"test_trace.py.*cannot hold torch\.no_grad"),
        (in_half_precision, r"test_trace.py.*torch\.autocast\(\): detach"),
        (by_a_coin(lambda: torch.rand(1).item()), "draws random numbers while it decides"),
        (by_a_coin(random.random), "draws random numbers while it decides"),
        (by_a_coin(np.random.rand), "draws random numbers while it decides"),
        (counting, "test_trace.py.*works in place"),
        (with_a_hidden_parameter, "test_trace.py.*a parameter that is not an attribute"),
    ],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_what_a_graph_cannot_hold_is_refused(between, words, gradients):
    model = Written(between, a=nn.Conv2d(8, 8, 3, padding=1))
    model.register_buffer("count", torch.ones(()))
    model.hidden = [nn.Parameter(torch.ones(()))]
    with torch.set_grad_enabled(gradients), pytest.raises(TraceError, match=words):
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))
    assert model.count == 1


def test_buffers_are_read_in_every_run():
    model = Written(lambda m, x: x * (1 / m.scale) + m.places.expand(x.shape[0], -1, -1, -1))
    model.register_buffer("scale", torch.linspace(1, 2, 8).view(-1, 1, 1))
    model.register_buffer("places", torch.randn(1, 8, 8, 8))
    net = supernet(model)
    assert_exact(net, model=model)
    assert not net.frozen
    assert net.model.state_dict().keys() == model.state_dict().keys()
    model.scale.mul_(2)
    net.model.load_state_dict(model.state_dict())
    assert torch.equal(net(pixels(2)), model(pixels(2)))


def test_control_flow_may_depend_on_a_buffer():
    model = Written(lambda m, x: m.a(x) if m.ready else x, a=nn.Conv2d(8, 8, 1))
    model.register_buffer("ready", torch.tensor(True))
    net = supernet(model)
    assert_exact(net, model=model)
    assert "a" in [layer for axis in net.space.axes for layer in axis.layers]


@pytest.mark.parametrize(
    "write", [lambda m: m.count.add_(1), lambda m: setattr(m, "count", m.count + 1)]
)
def test_a_buffer_that_is_written_where_another_decides_is_refused(write):
    def between(m, x):
        if m.ready:
            write(m)
        return m.a(x)

    model = Written(between, a=nn.Conv2d(8, 8, 1))
    model.register_buffer("ready", torch.tensor(True))
    model.register_buffer("count", torch.ones(()))
    with pytest.raises(TraceError, match="control flow"):
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))


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


def test_a_compiled_model_is_taken_as_what_it_is():
    model = randomised(build_model("resnet20", num_classes=4).double(), pixels(8))
    net = Supernet.trace(torch.compile(model), pixels(2))
    assert net.model.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(net.eval()(pixels(2)), model.eval()(pixels(2)))


def test_a_model_whose_layers_cannot_be_set_is_refused():
    with pytest.warns(FutureWarning):
        model = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True)))
    with pytest.raises(TraceError, match=r"does not let its `inplace` be set .*jit"):
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))


@torch.fx.wrap
def told_the_mode(x, training):
    return x * 2 if training and x.sum() != 0 else x


def test_what_such_an_error_advises_is_traced_and_kept_whole():
    model = Written(lambda m, x: told_the_mode(x, m.training))
    net = Supernet.trace(model, torch.zeros(1, 3, 8, 8))
    assert "no rule for told_the_mode" in net.frozen[0].reason
    images = torch.randn(2, 3, 8, 8)
    for training in (True, False):
        torch.testing.assert_close(net.train(training)(images), model.train(training)(images))


def test_a_frozen_layer_of_a_sequential_names_no_line_of_whoever_traces_it():
    layers = [nn.Conv2d(3, 8, 1), nn.LocalResponseNorm(3), nn.Flatten(), nn.Linear(512, 4)]
    (frozen,) = Supernet.trace(nn.Sequential(*layers), torch.zeros(1, 3, 8, 8)).frozen
    assert frozen.reason.endswith("no rule for LocalResponseNorm: 1")


def test_an_example_that_is_no_image_is_refused():
    with pytest.raises(TraceError, match=r"shape \[3, 8, 8\]; expected images \[B, C, H, W\]"):
        Supernet.trace(Own(), torch.zeros(3, 8, 8))
    with pytest.raises(TraceError, match=r"example input is None; expected images"):
        Supernet.trace(Own(), None)


def test_what_is_no_module_is_refused():
    with pytest.raises(TraceError, match=r"the model is a type; expected a torch\.nn\.Module"):
        Supernet.trace(Own, torch.zeros(1, 3, 8, 8))


def test_an_image_size_that_the_model_does_not_take_is_refused():
    from torchvision.models import vit_b_16

    with torch.device("meta"), pytest.raises(TraceError, match="Wrong image height"):
        Supernet.trace(vit_b_16(), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("lazy", [nn.LazyConv2d(8, 1), nn.LazyBatchNorm2d()])
def test_a_lazy_layer_that_has_not_run_is_named(lazy):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), lazy, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(TraceError, match=r"1\.weight of Sequential has no shape yet.*call it once"):
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))
    model(torch.zeros(1, 3, 8, 8))
    Supernet.trace(model, torch.zeros(1, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 8, 3)))
    with pytest.raises(TraceError, match="Sequential cannot be copied"):
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divisor": 0}, "divisor is 0; expected a positive integer"),
        ({"min_ratio": 0.0}, "min_ratio is 0.0; expected a share"),
        ({"min_ratio": 1.5}, "min_ratio is 1.5"),
        ({"divisor": 2.5}, "divisor is 2.5; expected a positive integer"),
        ({"min_ratio": "1"}, "min_ratio is '1'; expected a share"),
        ({"ignore": "stem"}, "ignore is 'stem'; expected a list: ['stem']"),
        ({"ignore": [3]}, "ignore is [3]; expected a list of patterns"),
        ({"only": None}, "only is None; expected a list of patterns"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Supernet.trace(Own(), torch.zeros(1, 3, 8, 8), **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", [Own, mobilenet_v2, swin_t])
def test_the_model_is_left_as_it_was(build, training):
    model = build().train(training)
    next(iter(model.children())).train(not training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    inplace = [getattr(module, "inplace", None) for module in model.modules()]
    size = 8 if build is Own else 32
    net = Supernet.trace(model, torch.zeros(1, 3, size, size))
    assert [module.training for module in model.modules()] == modes
    assert [getattr(module, "inplace", None) for module in model.modules()] == inplace
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert net.training is training
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert any(parameter.any() for parameter in model.parameters())


def test_frozen_parameters_stay_frozen():
    model = Own()
    model.stem.requires_grad_(False)
    net = Supernet.trace(model, torch.zeros(1, 3, 8, 8))
    for module in (net.model, net.extract(net.space.uniform(0.5))):
        assert not module.get_submodule("stem").weight.requires_grad
        assert module.get_submodule("head").weight.requires_grad


def test_widths_follow_divisor_and_smallest_ratio():
    wide = nn.Sequential(nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    image = torch.zeros(1, 3, 1, 1)
    (axis,) = Supernet.trace(wide, image).space.axes
    assert axis.choices == tuple(range(16, 129, 8))
    (axis,) = Supernet.trace(wide, image, divisor=32, min_ratio=0.3).space.axes
    assert axis.choices == (64, 96, 128)
    (axis,) = Supernet.trace(wide, image, divisor=50, min_ratio=0.5).space.axes
    assert axis.choices == (100, 128)
    narrow = nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    net = Supernet.trace(narrow, image)
    assert net.space.axes[0].choices == tuple(range(2, 13))
    net = Supernet.trace(narrow, image, divisor=16)
    assert net.space.axes == ()
    assert net.frozen[0].reason == "no width below 12 is admissible"


def test_the_first_argument_is_the_images_and_others_keep_their_defaults():
    model = randomised(Own().double(), pixels(8))
    net = Supernet.trace(model, pixels(1))
    with torch.no_grad():
        assert torch.equal(net.eval()(pixels(2)), model(pixels(2)))
    assert [n.target for n in net.model.graph.nodes if n.op == "placeholder"] == ["x"]


@pytest.mark.parametrize("batch", [1, 2, 11, 13])
def test_the_batch_stays_free(batch):
    net = supernet(Own()).eval()
    subnet = net.space.uniform(0.5)
    with torch.no_grad():
        out = net(pixels(batch), subnet)
        assert out.shape == (batch, 5)
        torch.testing.assert_close(out[:1], net(pixels(batch)[:1], subnet))


def test_an_extracted_network_can_be_traced_again():
    net = supernet(Own()).eval()
    small = net.extract(net.space.uniform(0.5))
    again = Supernet.trace(small, pixels(1), divisor=1)
    assert again.cost() == net.cost(net.space.uniform(0.5))
    assert len(again.space.axes) == len(net.space.axes)
    assert_exact(again, model=small)


def test_ignored_layers_stay_whole_with_their_blocks():
    model, images = build_model("resnet20", num_classes=4), torch.zeros(1, 3, 8, 8)
    free = Supernet.trace(model, images)
    kept = Supernet.trace(model, images, ignore=["layer3", "*.0.conv1"])
    gone = {layer for axis in free.space.axes for layer in axis.layers} - {
        layer for axis in kept.space.axes for layer in axis.layers
    }
    assert {"layer3.1.conv1", "layer3.0.conv1", "layer1.0.conv1"} <= gone
    assert "layer2.1.conv1" not in gone
    assert not [block.name for block in kept.space.blocks if block.name.startswith("layer3")]
    assert {f.reason for f in kept.frozen} == {"kept whole as asked"}
    small = kept.extract(kept.space.smallest)
    for name, module in small.named_modules():
        if name.startswith("layer3") and isinstance(module, nn.Conv2d):
            assert module.out_channels == 64


def test_only_these_layers_are_elastic():
    model, images = build_model("resnet20", num_classes=4), torch.zeros(1, 3, 8, 8)
    net = Supernet.trace(model, images, only=["layer2.*"])
    assert net.space.axes and net.space.blocks
    for axis in net.space.axes:
        assert all(layer.startswith("layer2.") for layer in axis.layers)
    assert all(block.name.startswith("layer2.") for block in net.space.blocks)
    assert 0 < net.space.elastic_share < 1


def test_a_pattern_that_matches_nothing_is_named():
    model = build_model("resnet20", num_classes=4)
    with pytest.raises(ValueError, match=r"pattern 'layer9' matches no layer; expected"):
        Supernet.trace(model, torch.zeros(1, 3, 8, 8), ignore=["layer9"])


class SizeDecides(nn.Module):
    """Control flow that depends on the size of the images, on the batch, or on a width."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.shape[{"height": 2, "batch": 0, "width": 1}[self.what]] > 4:
            x = x.relu()
        return self.head(self.mix(x)[:, :, : math.ceil(x.shape[3] / 2)].mean((2, 3)))


def test_control_flow_may_depend_on_the_size_of_the_images():
    net = supernet(SizeDecides("height"))
    assert net.frozen == ()
    assert_exact(net)


def test_a_width_that_decides_does_not_shrink():
    net = supernet(SizeDecides("width"))
    assert [(f.name, f.reason.split(":")[0]) for f in net.frozen] == [
        ("stem", "decides what the model computes")
    ]
    assert_exact(net)


def test_control_flow_on_the_batch_is_refused():
    with pytest.raises(TraceError, match=r"control flow"):
        supernet(SizeDecides("batch"))


class Auxiliary(nn.Module):
    """A head that only training calls, and a rate that only training applies."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.stem(x)
        aux = self.aux(x) if self.training else None
        x = F.dropout(x.mean((2, 3)), 0.5 if self.training else 0.0)
        return (self.head(x), aux) if self.training else self.head(x)


def test_auxiliary_heads_are_left_out_and_named():
    net = supernet(Auxiliary())
    assert [(f.name, f.reason) for f in net.frozen] == [("aux", "only training calls it; left out")]
    assert_exact(net)
    images = pixels(2)
    net.train()
    torch.manual_seed(0)
    one = net(images)
    assert not torch.equal(one, net(images))  # dropout draws anew
    net.eval()
    assert torch.equal(net(images), net(images))


class Writing(nn.Module):
    """Two residual blocks whose activation, one for all, works in place, and an activation whose
    operand somebody else reads as well."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two, self.three = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.shared = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.one(x) + x)
        x = self.act(self.two(x) + x)
        y = self.three(x)
        mean = y.mean((2, 3), keepdim=True)
        x = self.shared(y) + mean
        return self.head(x.mean((2, 3)))


def test_what_worked_in_place_does_so_again_where_nobody_else_reads_it():
    net = Supernet.trace(Writing(), torch.zeros(1, 3, 8, 8))
    assert net.model.get_submodule("act").inplace
    assert not net.model.get_submodule("shared").inplace


@pytest.mark.parametrize("dropped", [["one"], ["two"], ["one", "two"], []])
def test_a_dropped_block_leaves_its_shortcut_as_it_is(dropped):
    torch.manual_seed(0)
    net = Supernet.trace(Writing().double(), torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    blocks = {block.layers[0]: block.name for block in net.space.blocks}
    subnet = Subnet(net.space.full.widths, frozenset(blocks[layer] for layer in dropped))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    small = net.extract(subnet)
    assert small.get_submodule("act").inplace is not bool(dropped)
    small(images).square().sum().backward()  # fails where a saved result was written over
    net(images, subnet).square().sum().backward()
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(net.model.get_parameter(name).grad, parameter.grad)
