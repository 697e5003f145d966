"""Ways to write a model that are easy to get wrong: the answer is exact, frozen, or refused, and
never silently another network."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stp_ray.elastic import Supernet
from stp_ray.errors import TraceError

from .networks import pixels, randomised, supernet
from .same import assert_exact

pytestmark = pytest.mark.usefixtures("one_way_to_compute")


class Base(nn.Module):
    """Two convolutions of an image, a third of the second's width, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(3, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 1)
        self.h = nn.Linear(8, 4)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("ema", torch.zeros(8))
        self.mask = [True, False] * 8

    def out(self, x: Tensor) -> Tensor:
        return self.h(x.mean((2, 3)))

    def tokens(self, x: Tensor) -> Tensor:
        return self.b(x).relu().flatten(2).transpose(1, 2)


def index_by_the_size_of_another(s: Base, x: Tensor) -> Tensor:
    y = s.b(x).relu()
    return s.out(s.c(s.a(x)[:, : y.shape[1]])) + s.out(y)


def pad_by_the_size_of_another(s: Base, x: Tensor) -> Tensor:
    y = s.b(x).relu()
    return s.out(s.c(F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - 3)))) + s.out(y)


def slice_of_a_list(s: Base, x: Tensor) -> Tensor:
    parts = s.a(x).relu().chunk(4, 1)[1:3]
    return s.out(s.c(torch.cat([parts[0], parts[1]], 1)))


def parts_as_they_come(s: Base, x: Tensor) -> Tensor:
    return s.out(s.c(torch.cat(s.b(x).relu().chunk(2, 1), 1)))


def axis_for_dim(s: Base, x: Tensor) -> Tensor:
    one, other = s.a(x).relu().chunk(2, axis=1)
    return s.out(s.c(torch.cat([one[:, :4], other[:, :4]], axis=1)))


def input_by_name(s: Base, x: Tensor) -> Tensor:
    y = s.c(input=s.b(x))
    return s.out(y * torch.softmax(input=y, dim=2))


def by_a_mask(s: Base, x: Tensor) -> Tensor:
    return s.out(s.c(s.a(x).relu()[:, s.mask]))


def times_a_matrix(s: Base, x: Tensor) -> Tensor:
    return s.h((s.tokens(x) @ s.w).mean(1))


def three_operands(s: Base, x: Tensor) -> Tensor:
    return s.h(torch.einsum("bnc,cd,de->bne", s.tokens(x), s.w, s.w).mean(1))


def sum_that_may_be_over_one(s: Base, x: Tensor) -> Tensor:
    return s.out(torch.einsum("bchw,oc->bohw", s.b(x).relu(), s.w))


def attention_with_weights(s: Base, x: Tensor) -> Tensor:
    tokens = s.tokens(x)
    return s.h(s.attention(tokens, tokens, tokens)[0].mean(1))


def attention_by_place(s: Base, x: Tensor) -> Tensor:
    tokens = s.tokens(x)
    return s.h(s.attention(tokens, tokens, tokens, None, False, attn_mask=None)[0].mean(1))


def squeeze_of_all(s: Base, x: Tensor) -> Tensor:
    return s.h(F.adaptive_avg_pool2d(s.b(x).relu(), 1).squeeze())


def size_over_a_rank(s: Base, x: Tensor) -> Tensor:
    y = s.b(x).relu()
    return s.out(s.c(y)[:, :, : y.shape[1] // y.dim()]) + s.out(y)


def rank_that_decides(s: Base, x: Tensor) -> Tensor:
    y = s.b(x).relu()
    return s.out(s.c(y)) if y.dim() == 4 and y.dtype == x.dtype else s.h(y)


def slice_of_a_shape(s: Base, x: Tensor) -> Tensor:
    y = s.b(x).relu()
    batch, channels = y.shape[:2]
    gate = s.c(y).view(batch, channels, -1).mean(2)
    return s.out(y * gate.view(batch, channels, 1, 1).expand(batch, *y.shape[1:]))


def view_as_a_slice_of_a_shape(s: Base, x: Tensor) -> Tensor:
    y = s.b(x).relu()
    return s.h(s.c(y).mean((2, 3), keepdim=True).view(y.size()[:2]))


def slice_of_a_slice(s: Base, x: Tensor) -> Tensor:
    y = s.b(x).relu()
    return s.out(s.c(y).view(y.shape[:1][0], y.shape[:-2][1], *y.shape[-2:]) + y)


def parts_one_by_one(s: Base, x: Tensor) -> Tensor:
    q, k, v = (part.relu() for part in s.a(x)[:, :15].chunk(3, 1))
    one, other = (part * 2 for part in s.a(x).split(8, 1))
    return s.h((q * k + v).mean((2, 3)) @ s.w[:5]) + s.out(s.c(one) + s.c(other))


def size_of_another_for_pooling(s: Base, x: Tensor) -> Tensor:
    y = F.max_pool2d(s.b(x).relu(), 2)
    return s.out(F.interpolate(s.c(y), size=x.shape[-2:])) + s.out(F.avg_pool2d(y, y.size()[2:]))


WRITTEN = [
    slice_of_a_shape, view_as_a_slice_of_a_shape, slice_of_a_slice, parts_one_by_one,
    size_of_another_for_pooling,
    index_by_the_size_of_another, pad_by_the_size_of_another, slice_of_a_list, parts_as_they_come,
    axis_for_dim, input_by_name, by_a_mask, times_a_matrix, three_operands,
    sum_that_may_be_over_one, attention_with_weights, attention_by_place, squeeze_of_all,
    size_over_a_rank, rank_that_decides,
]  # fmt: skip


def model(way) -> nn.Module:
    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            return way(self, x)

    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize("way", WRITTEN, ids=lambda way: way.__name__)
def test_exact_or_frozen(way):
    dense = randomised(model(way).double(), pixels(8))
    net = Supernet.trace(dense, pixels(2), divisor=1)
    assert_exact(net, model=dense)


@pytest.mark.parametrize(
    "way",
    [rank_that_decides, slice_of_a_shape, slice_of_a_slice, size_of_another_for_pooling],
    ids=lambda way: way.__name__,
)
def test_neither_a_rank_nor_a_part_of_a_shape_freezes(way):
    assert supernet(model(way)).frozen == ()


class Named(NamedTuple):
    logits: Tensor
    more: Tensor


def test_a_named_tuple_in_both_modes_is_no_difference_between_them():
    def way(s: Base, x: Tensor) -> Named:
        y = s.b(x)
        return Named(s.out(s.c(y)), s.out(y))

    dense = model(way)
    logits, more = Supernet.trace(dense, pixels(2).float())(pixels(2).float())
    torch.testing.assert_close(logits, dense(pixels(2).float()).logits)
    torch.testing.assert_close(more, dense(pixels(2).float()).more)


def test_a_layer_without_a_rule_that_nothing_elastic_reaches_is_listed():
    layers = [nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 1)), nn.ReLU(), nn.Flatten()]
    net = Supernet.trace(nn.Sequential(*layers, nn.Linear(512, 4)), torch.zeros(1, 3, 8, 8))
    assert [(f.name, f.size) for f in net.frozen] == [("0", 8)]
    assert "no rule for ParametrizedConv2d" in net.frozen[0].reason


def written_in_training(s: Base, x: Tensor) -> Tensor:
    y = s.b(x)
    if s.training:
        y.mul_(3.0)
    return s.out(s.c(y))


def buffer_in_training(s: Base, x: Tensor) -> Tensor:
    y = s.b(x)
    if s.training:
        s.ema.mul_(0.9).add_(y.mean((0, 2, 3)))
    return s.out(s.c(y))


def constant_of_training(s: Base, x: Tensor) -> Tensor:
    return s.out(s.c(s.b(x) * torch.tensor(3.0 if s.training else 1.0)))


def device_decides(s: Base, x: Tensor) -> Tensor:
    y = s.b(x).relu()
    return s.out(s.c(y) if y.device.type == "cpu" else y)


@pytest.mark.parametrize(
    "way",
    [written_in_training, buffer_in_training, constant_of_training, device_decides],
    ids=lambda way: way.__name__,
)
def test_refused(way):
    with pytest.raises(TraceError, match=r"training|control flow"):
        supernet(model(way))


def test_a_head_that_training_calls_twice_is_no_auxiliary():
    def way(s: Base, x: Tensor):
        y, z = s.b(x).relu(), s.c(s.b(x))
        return (s.out(z), s.out(y)) if s.training else s.out(z)

    assert supernet(model(way)).frozen == ()


def test_whole_layers_keep_every_dimension():
    dense = model(attention_by_place)
    for options in ({"ignore": ["attention"]}, {"only": ["c"]}):
        if "only" in options:
            dense = model(lambda s, x: s.out(s.c(s.b(x)).relu()) + attention_by_place(s, x))
        net = Supernet.trace(dense, torch.zeros(1, 3, 8, 8), divisor=1, **options)
        small = net.extract(net.space.smallest)
        assert small.attention.in_proj_weight.shape == (24, 8)
        assert small.attention.out_proj.weight.shape == (8, 8)
