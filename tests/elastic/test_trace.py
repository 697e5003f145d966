"""What tracing is asked for, and what it leaves alone."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torchvision.models import mobilenet_v2, swin_t

from stp_ray.elastic import Supernet
from stp_ray.errors import TraceError
from stp_ray.models import build_model

from .networks import Own, Written, pixels, randomised, supernet
from .same import assert_exact, counted_macs, subnets_of


def test_a_compiled_model_is_taken_as_what_it_is():
    model = randomised(build_model("resnet20", num_classes=4).double(), pixels(8))
    net = Supernet.trace(torch.compile(model), pixels(2))
    assert net.model.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(net.eval()(pixels(2)), model.eval()(pixels(2)))


def test_an_example_that_is_no_image_is_refused():
    with pytest.raises(TraceError, match=r"shape \[3, 8, 8\]; expected images \[B, C, H, W\]"):
        Supernet.trace(Own(), torch.zeros(3, 8, 8))
    with pytest.raises(TraceError, match=r"example input is None; expected images"):
        Supernet.trace(Own(), None)


def test_what_is_no_module_is_refused():
    with pytest.raises(TraceError, match=r"the model is a type; expected a torch\.nn\.Module"):
        Supernet.trace(Own, torch.zeros(1, 3, 8, 8))


def test_code_that_is_compiled_already_is_refused():
    with pytest.warns(FutureWarning):
        model = torch.jit.script(nn.Conv2d(3, 8, 3))
    with pytest.raises(TraceError, match=r"ScriptModule, .*; expected the torch\.nn\.Module"):
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))


class Masked(Own):
    def forward(self, x, mask, *, scale, bias=0.0, **more):
        return super().forward(x * mask * scale)


def test_a_model_of_more_than_images_is_refused():
    with pytest.raises(TraceError, match=r"Masked wants 'mask', 'scale' besides .* give the rest"):
        Supernet.trace(Masked(), torch.zeros(1, 3, 8, 8))


def test_an_example_of_another_type_than_the_weights_is_refused():
    with pytest.raises(TraceError, match=r"of torch\.float32: .*; expected .* torch\.float64"):
        Supernet.trace(Own().double(), torch.zeros(1, 3, 8, 8))


class Silent(Own):
    def forward(self, x):
        return None


def test_a_model_that_returns_nothing_is_refused():
    with pytest.raises(TraceError, match=r"returns None whatever the images are; expected logits"):
        Supernet.trace(Silent(), torch.zeros(1, 3, 8, 8))


def test_an_image_size_that_the_model_does_not_take_is_refused():
    from torchvision.models import vit_b_16

    with torch.device("meta"), pytest.raises(TraceError, match="Wrong image height"):
        Supernet.trace(vit_b_16(), torch.zeros(1, 3, 32, 32))


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


class Features(nn.Module):
    """Returns what its head saw besides the logits."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        features = self.stem(x).relu().mean((2, 3))
        return self.head(features), features


def test_what_a_second_output_keeps_whole_is_listed():
    net = Supernet.trace(Features(), torch.zeros(1, 3, 8, 8))
    assert not net.space.axes
    assert {f.name: f.reason for f in net.frozen} == {
        "stem": "the model returns more than its logits"
    }


class LowRank(nn.Module):
    """A weight plus a product of two thin matrices."""

    def __init__(self, rows, columns):
        super().__init__()
        self.up = nn.Parameter(torch.randn(rows, 2))
        self.down = nn.Parameter(torch.randn(2, columns))

    def forward(self, weight):
        return weight + (self.up @ self.down).view(weight.shape)


def low_rank(layer):
    own = LowRank(len(layer.weight), layer.weight[0].numel())
    return parametrize.register_parametrization(layer, "weight", own)


@pytest.mark.parametrize(
    "layer",
    [
        low_rank(nn.Conv2d(8, 8, 3, padding=1)),
        low_rank(nn.Linear(8, 8)),
        parametrizations.orthogonal(nn.Linear(8, 8)),
    ],
    ids=["convolution", "linear", "orthogonal"],
)
@torch.no_grad()
def test_weights_that_a_layer_multiplies_count_once_for_an_image_that_comes_alone(layer):
    model = Written(lambda m, x: m.after(m.layer(x)), 12, layer=layer, after=nn.Conv2d(8, 12, 1))
    net = supernet(model)
    assert [axis.name for axis in net.space.axes] == ["after"]
    assert [frozen.name for frozen in net.frozen] == ["stem"]
    for subnet in subnets_of(net, 3):
        small = net.extract(subnet)
        out, macs = counted_macs(small, pixels(1))
        cost = net.cost(subnet)
        assert (macs, sum(p.numel() for p in small.parameters())) == (cost.macs, cost.params)
        torch.testing.assert_close(net(pixels(1), subnet), out)


def test_an_operation_on_the_mean_of_a_batch_is_refused():
    model = Written(lambda m, x: x + m.mix(x.mean((0, 2, 3)))[:, None, None], mix=nn.Linear(8, 8))
    with pytest.raises(TraceError, match=r"mix at test_trace.* not grow as the batch does"):
        supernet(model)
