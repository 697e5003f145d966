"""An extracted subnet is an ordinary module."""

import copy
import io
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer

from stp_ray.elastic import Subnet
from stp_ray.elastic.attention import MultiheadSelfAttention, WindowSelfAttention
from stp_ray.errors import TraceError

from .networks import Own, Tokens, Written, pixels, supernet
from .same import assert_exact


def test_layers_keep_their_names_and_have_their_own_sizes():
    net = supernet(Own()).eval()
    subnet = net.space.canonical(Subnet(net.space.uniform(0.5).widths, ["blocks.1"]))
    small = net.extract(subnet)
    names = {name for name, _ in net.model.named_parameters()}
    kept = {name for name, _ in small.named_parameters()}
    assert kept == {name for name in names if not name.startswith("blocks.1.")}
    layers = dict(small.named_modules())
    assert (layers["stem"].out_channels, layers["stem"].in_channels) == (6, 3)
    assert tuple(layers["stem"].weight.shape) == (6, 3, 3, 3)
    assert layers["depthwise"].groups == layers["depthwise"].in_channels == 11
    assert layers["grouped"].groups * 6 == layers["grouped"].out_channels
    assert layers["norm"].num_channels == layers["grouped"].out_channels
    assert layers["head"].in_features == 4 * layers["grouped"].out_channels
    assert layers["head"].out_features == 5
    for layer in layers.values():
        assert type(layer).__module__.startswith(("torch.", "stp_ray.elastic")) or layer is small


def test_every_parameter_is_a_leaf_that_trains():
    torch.manual_seed(0)  # with some weights both units of "squeeze" are dead
    net = supernet(Own()).train()
    small = net.extract(net.space.uniform(0.5))
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    main = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(pixels(4)).square().sum().backward()
    optimizer.step()
    for name, parameter in small.named_parameters():
        assert isinstance(parameter, nn.Parameter) and parameter.is_leaf
        assert not torch.equal(parameter, before[name]) or name.endswith("up.bias"), name
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, main[name]) and parameter.grad is None


def test_an_extraction_can_be_copied_saved_and_loaded():
    net = supernet(Own()).eval()
    subnet = net.space.uniform(0.5)
    small = net.extract(subnet)
    out = small(pixels(2))
    assert torch.equal(copy.deepcopy(small)(pixels(2)), out)
    other = supernet(Own()).eval().extract(subnet)
    assert not torch.equal(other(pixels(2)), out)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(pixels(2)), out)


def test_weights_that_a_hook_computes_are_extracted_after_a_step():
    layers = {"after": torch.nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))}
    net = supernet(Written(lambda m, x: m.after(x).relu(), **layers))
    net.train()(pixels(2)).sum().backward()
    small = net.eval().extract(net.space.smallest)
    torch.testing.assert_close(small(pixels(2)), net(pixels(2), net.space.smallest))


def test_statistics_are_copied_too():
    net = supernet(Own()).eval()
    subnet = net.space.uniform(0.5)
    width = net.extract(subnet).get_submodule("bn").num_features
    stats = {
        name: {
            "running_mean": torch.randn_like(module.running_mean),
            "running_var": torch.rand_like(module.running_var) + 0.5,
        }
        for name, module in net.extract(subnet).named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    small = net.extract(subnet, stats)
    assert small.get_submodule("bn").running_mean.shape == (width,)
    for name, found in stats.items():
        layer = small.get_submodule(name)
        assert torch.equal(layer.running_var, found["running_var"])
        assert layer.running_var.data_ptr() != found["running_var"].data_ptr()


@pytest.mark.usefixtures("one_way_to_compute")
@pytest.mark.parametrize(
    "build",
    [
        models.resnet18,
        models.mobilenet_v2,
        models.swin_t,
        partial(VisionTransformer, 32, 8, 4, 4, 64, 128),
    ],
    ids=["resnet18", "mobilenet_v2", "swin_t", "vit"],
)
def test_an_extraction_is_an_ordinary_model(build):
    """Its layers have the names that they had, are printed with their sizes, and torch.export
    takes it for any batch."""
    torch.manual_seed(0)
    model = build(num_classes=10)
    net = supernet(model, size=32).eval()
    subnet = net.space.sample(random.Random(0))
    assert subnet.dropped
    small = net.extract(subnet)

    gone = {
        layer
        for block in net.space.blocks
        if block.name in subnet.dropped
        for layer in block.layers
    }
    names = set(model.state_dict())
    lost = names - set(small.state_dict())
    assert set(small.state_dict()) <= names
    assert lost == {n for n in names if any(n.startswith(f"{layer}.") for layer in gone)}

    text, layers = str(small), dict(small.named_modules())
    for layer in layers.values():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert repr(layer) in text
            width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            assert len(layer.weight) == width

    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(small, (pixels(2, 32),), dynamic_shapes=({0: batch},))
    images = pixels(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), small(images), rtol=1e-9, atol=1e-9)
    assert set(program.state_dict) == set(small.state_dict())


class Tied(nn.Module):
    """Two layers with one weight, one of them on a residual branch."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.free = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        x = x + self.one(x).relu()
        x = x + self.free(x).relu()
        return self.head(self.two(x).relu() * 2)


def test_tied_weights_stay_tied_and_are_counted_once():
    net = supernet(Tied())
    assert [block.name for block in net.space.blocks] == ["free"]
    small = net.extract(net.space.uniform(0.5))
    assert small.get_submodule("one").weight is small.get_submodule("two").weight
    assert small.get_submodule("one").bias is not small.get_submodule("two").bias
    assert_exact(net)


def test_a_layer_that_is_called_twice_is_one_layer():
    def twice(m, x):
        return m.shared(m.shared(x).relu()) + x

    net = supernet(Written(twice, shared=nn.Conv2d(8, 8, 3, padding=1)))
    assert net.space.blocks == ()
    assert_exact(net)


def test_attention_keeps_the_stock_class_while_nothing_is_cut():
    class Stock(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 2, 2)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            x = self.stem(x).flatten(2).transpose(1, 2)
            x, _ = self.attention(x, x, x, need_weights=False)
            return self.head(x.mean(1))

    net = supernet(Stock())
    assert type(net.extract(net.space.full).attention) is nn.MultiheadAttention
    small = net.extract(net.space.uniform(0.5)).attention
    assert isinstance(small, MultiheadSelfAttention)
    assert (small.num_heads, small.head_dim, small.embed_dim) == (2, 4, 8)
    assert "num_heads=2" in repr(small)


@pytest.mark.parametrize(
    ("call", "elastic"),
    [
        (lambda m, x: m.attention(x, x, x)[0], True),
        (lambda m, x: m.attention(query=x, key=x, value=x, average_attn_weights=False)[0], True),
        (lambda m, x: (both := m.attention(x, x, x))[0] + both[1].mean(), False),
    ],
)
def test_attention_whose_weights_nobody_reads_is_elastic(call, elastic):
    def between(m, x):
        tokens = x.flatten(2).transpose(1, 2)
        return call(m, tokens).transpose(1, 2).reshape(x.shape)

    model = Written(between, attention=nn.MultiheadAttention(8, 4, batch_first=True))
    net = supernet(model)
    assert ("heads" in {axis.unit for axis in net.space.axes}) == elastic
    assert_exact(net, model=model)


def _masked(m, x):
    return m.attention(x, x, x, attn_mask=torch.ones(64, 64).triu(1).bool(), need_weights=False)[0]


def _crossed(m, x):
    return m.attention(x, y := x.flip(1), y, need_weights=False)[0]


@pytest.mark.parametrize("other", [_masked, _crossed])
@pytest.mark.parametrize("plain_first", [True, False])
def test_attention_that_is_plain_in_one_call_alone_stays_whole(other, plain_first):
    def plain(m, x):
        return m.attention(x, x, x, need_weights=False)[0]

    def between(m, x):
        tokens = m.tokens(x.flatten(2).transpose(1, 2))
        for call in (plain, other) if plain_first else (other, plain):
            tokens = call(m, tokens)
        return m.after(tokens.transpose(1, 2).reshape(-1, 8, 8, 8))

    layers = {"tokens": nn.Linear(8, 8), "after": nn.Conv2d(8, 8, 1)}
    model = Written(between, attention=nn.MultiheadAttention(8, 4, batch_first=True), **layers)
    net = supernet(model)
    assert {axis.name for axis in net.space.axes} == {"stem", "after"}
    assert "attention" in {frozen.name for frozen in net.frozen}
    assert_exact(net, model=model)


def test_a_mask_that_shrinks_elsewhere_stays_whole_with_its_attention():
    def between(m, x):
        one, other = (mix(x.flatten(2)).transpose(1, 2) for mix in (m.one, m.other))  # [B, 10, 8]
        masked = m.attention(one, one, one, attn_mask=m.mask, need_weights=False)[0]
        shifted = other + m.mask.mean(1)[:, None]
        return x + (masked.mean(1) + shifted.mean(1))[:, :, None, None]

    layers = {"one": nn.Linear(64, 10), "other": nn.Linear(64, 10)}
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    mask = nn.Parameter(torch.randn(10, 10))
    model = Written(between, attention=attention, mask=mask, **layers)
    assert_exact(supernet(model), model=model)


def test_attention_that_lost_heads_refuses_what_it_cannot_compute():
    def between(m, x):
        tokens = x.flatten(2).transpose(1, 2)
        return m.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)

    net = supernet(Written(between, attention=nn.MultiheadAttention(8, 4, batch_first=True)))
    small = net.extract(net.space.smallest).attention
    x = torch.randn(2, 5, small.embed_dim, dtype=torch.float64)
    for key, value in ((x + 1, x), (x, x + 1)):
        with pytest.raises(ValueError, match="another key or value than the query; expected"):
            small(x, key, value)
    for mask in ({"key_padding_mask": x[..., 0] > 0}, {"attn_mask": x[0] > 0}, {"is_causal": True}):
        with pytest.raises(ValueError, match="got a mask; expected none"):
            small(x, x, x, **mask)


def test_attention_over_the_batch_is_refused():
    def between(m, x):
        tokens = x.flatten(2).transpose(1, 2)
        return m.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)

    model = Written(between, attention=nn.MultiheadAttention(8, 4))
    with pytest.raises(TraceError, match=r"attends over the images .*batch_first=True"):
        supernet(model)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_with_any_number_of_heads(batch_first, bias):
    """With all heads kept it is PyTorch's own; heads that are masked out are heads dropped."""
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first).double().eval()
    own = object.__new__(MultiheadSelfAttention)
    own.__dict__.update(stock.__dict__)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(own(x, x, x)[0], stock(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (14, 14), (10, 17)])
@pytest.mark.parametrize("shift", [0, 3])
def test_window_attention_with_all_heads_is_torchvisions(size, shift):
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    torch.manual_seed(0)
    stock = ShiftedWindowAttention(16, [7, 7], [shift, shift], 4).double().eval()
    nn.init.normal_(stock.relative_position_bias_table)
    own = object.__new__(WindowSelfAttention)
    own.__dict__.update(stock.__dict__, head_dim=4)
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    torch.testing.assert_close(own(x), stock(x))


def test_a_dropped_branch_leaves_its_shortcut():
    net = supernet(Tokens()).eval()
    names = [block.name for block in net.space.blocks]
    with torch.no_grad():
        for name in names:  # a branch that adds nothing is a branch left out
            subnet = Subnet(net.space.full.widths, [name])
            expected = net(pixels(2), net.space.canonical(subnet))
            silenced = copy.deepcopy(net)
            for layer in net.space.blocks[names.index(name)].layers:
                if layer.endswith(("proj", "fc2")):
                    for parameter in silenced.model.get_submodule(layer).parameters():
                        parameter.zero_()
            torch.testing.assert_close(silenced(pixels(2)), expected)


def test_an_extraction_that_is_saved_follows_train_and_eval():
    model = Written(lambda m, x: F.dropout(m.a(x), 0.5, m.training), a=nn.Conv2d(8, 8, 1))
    net = supernet(model)
    for training in (True, False):
        stored = io.BytesIO()
        torch.save(net.train(training).extract(net.space.smallest), stored)
        stored.seek(0)
        small = torch.load(stored, weights_only=False)
        for now in (True, False):
            one, other = (small.train(now)(pixels(2)) for _ in range(2))
            assert torch.equal(one, other) != now
        assert torch.equal(small(pixels(2)), net.eval()(pixels(2), net.space.smallest))


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(4, 8, affine=False), nn.LayerNorm(8, elementwise_affine=False)]
)
def test_a_norm_without_weights_that_is_called_on_two_widths_has_a_size_for_each(norm):
    def over(m, x):
        if isinstance(norm, nn.GroupNorm):
            return m.norm(x)
        return m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    net = supernet(
        Written(lambda m, x: over(m, m.b(over(m, x).relu())), norm=norm, b=nn.Conv2d(8, 8, 1))
    )
    stem, b = (next(a for a in net.space.axes if name in a.layers) for name in ("stem", "b"))
    assert stem is not b
    assert_exact(net)
    small = net.extract(net.space.canonical(Subnet({stem.name: 2, b.name: 3})))
    assert len([m for m in small.modules() if type(m) is type(norm)]) == 2
