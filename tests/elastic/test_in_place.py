"""Operations that work in place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stp_ray.elastic import Subnet, Supernet
from stp_ray.errors import TraceError

from .networks import Written, pixels, randomised
from .same import assert_exact


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


def test_a_result_has_the_type_of_what_it_is_written_over():
    model = Written(lambda m, x: m.after(_widened(x)), after=nn.Conv2d(8, 8, 1)).bfloat16().eval()
    images = pixels(2).bfloat16()
    net = Supernet.trace(model, images).eval()
    assert torch.equal(net(images), model(images))
    for subnet in (net.space.full, net.space.smallest):
        assert torch.equal(net(images, subnet), net.extract(subnet)(images))


def test_what_widens_nothing_leaves_the_type_to_the_run():
    """A mask, which is of another type: the network may be cast as the model may."""
    model = Written(lambda m, x: m.after(x.masked_fill_(x < 0, 0.0)), after=nn.Conv2d(8, 8, 1))
    net = Supernet.trace(model.eval(), pixels(2).float()).eval()
    small = net.extract(net.space.smallest)
    for kind in (torch.float64, torch.bfloat16):
        images = pixels(2).to(kind)
        assert torch.equal(net.to(kind)(images), model.to(kind)(images))
        assert small.to(kind)(images).dtype == kind


def _widened(x):
    x += torch.linspace(0, 1, 8)  # in single precision
    x *= 2
    return x


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
        lambda m, x: _beside(x, x.reshape(x.shape)),
        lambda m, x: _beside(x, x.ravel()),
        lambda m, x: _beside(x, x.movedim(1, 3)),
        lambda m, x: _beside(x, x.tensor_split(2, 1)[0]),
        lambda m, x: _beside(x, F.dropout(x, 0.5, m.training)),  # the operand itself in evaluation
        lambda m, x: _beside(x, m.drop(x)),
        lambda m, x: _twice(x.relu_(), x),
        lambda m, x: _twice(m.act(x), x),
        lambda m, x: _twice(F.relu(x, inplace=True), x),
        lambda m, x: _beside(x, F.relu_(x).chunk(2, 1)[1]),
        lambda m, x: (lambda views: _beside(views["a"], views["b"]))(_views(x)),
    ],
)
def test_in_place_operations_that_cannot_be_followed_are_refused(between):
    model = Written(
        between, drop=nn.Dropout(0.5), act=nn.ReLU(inplace=True),
        scale=nn.Parameter(torch.ones(8, 1, 1), requires_grad=False),
    )  # fmt: skip
    with pytest.raises(
        TraceError, match=r"at test_in_place\.py:\d+ .*in place.*expected"
    ) as caught:
        Supernet.trace(model, torch.zeros(1, 3, 8, 8))
    assert "\n" not in str(caught.value)


def _beside(x, other):
    """What reads the same memory after it was written over."""
    return x.relu_() + other.sum()


def _twice(y, x):
    """The same after it was written over before."""
    view = x.flatten(2)
    return y.add_(1) + view.sum()


@torch.fx.wrap
def _views(x):
    return {"a": x.view(x.shape), "b": x.view(x.shape)}


@pytest.mark.parametrize("make", [nn.Dropout, nn.Dropout2d, nn.Identity])
def test_dropout_before_an_operation_in_place_is_no_hindrance(make):
    layers = {"after": nn.Conv2d(8, 8, 3, padding=1), "drop": make()}

    def between(m, x):
        return F.relu(m.drop(m.after(x)), inplace=True) + x

    model = randomised(Written(between, **layers).double(), pixels(8))
    assert_exact(Supernet.trace(model, pixels(1)), model=model)


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
