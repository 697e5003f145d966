"""Networks put together at random from the operations that have rules: slices, extractions, prices
and gradients agree, and an operation without a rule freezes and is reported."""

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stp_ray.elastic import Supernet

from .networks import pixels, randomised
from .same import assert_direct_gradients_agree, assert_exact, assert_gradients_agree

SIZE = 6


class Conv(nn.Module):
    """A convolution, its normalisation, a nonlinearity."""

    def __init__(self, width, rng):
        super().__init__()
        self.out = rng.choice([6, 8, 12])
        groups = rng.choice([1, 1, 2 - width % 2])
        self.conv = nn.Conv2d(width, self.out, rng.choice([1, 3]), padding="same", groups=groups)
        norms = [nn.BatchNorm2d(self.out), nn.GroupNorm(2, self.out), nn.Identity()]
        self.norm = rng.choice(norms)
        self.act = rng.choice([nn.ReLU(inplace=True), nn.GELU(), nn.Hardswish()])

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Depthwise(nn.Module):
    def __init__(self, width, rng):
        super().__init__()
        self.out = width
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x):
        return F.relu(self.conv(x))


class Residual(nn.Module):
    """A branch that can be dropped, with a scale of its own."""

    def __init__(self, width, rng):
        super().__init__()
        self.out = width
        inner = Conv(width, rng)
        self.branch = nn.Sequential(inner, nn.Conv2d(inner.out, width, 1), nn.BatchNorm2d(width))
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x):
        return x + self.scale * self.branch(x)


class Dense(nn.Module):
    """A concatenation with what was made of it."""

    def __init__(self, width, rng):
        super().__init__()
        self.conv = Conv(width, rng)
        self.out = width + self.conv.out

    def forward(self, x):
        return torch.cat([x, self.conv(x)], 1)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width, rng):
        super().__init__()
        self.out = width
        self.squeeze, self.excite = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x):
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
        return x * gate.unsqueeze(-1).unsqueeze(-1)


class Split(nn.Module):
    """Halves that go different ways: by chunk, or by sizes."""

    def __init__(self, width, rng):
        super().__init__()
        half = width // 2
        self.sizes = None if width % 2 == 0 and rng.random() < 0.5 else [half, width - half]
        self.conv = Conv(half, rng)
        self.out = width - half + self.conv.out

    def forward(self, x):
        one, other = x.chunk(2, 1) if self.sizes is None else torch.split(x, self.sizes, 1)
        return torch.cat([self.conv(one), other.relu()], 1)


class Shuffle(nn.Module):
    """Channels of two groups in turn."""

    def __init__(self, width, rng):
        super().__init__()
        self.out = width
        self.groups = 2 if width % 2 == 0 else 1

    def forward(self, x):
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w)
        return x.transpose(1, 2).reshape(b, -1, h, w)


class Attend(nn.Module):
    """Self-attention over pixels, written in several ways."""

    def __init__(self, width, rng):
        super().__init__()
        self.out = width
        self.heads, self.size = 2, 3
        self.way = rng.choice(["fused", "matmul", "einsum"])
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * self.heads * self.size)
        self.proj = nn.Linear(self.heads * self.size, width)

    def forward(self, x):
        b, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(self.norm(tokens)).reshape(b, h * w, 3, self.heads, self.size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.way == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v)
        elif self.way == "matmul":
            mixed = (q @ k.transpose(-2, -1) * self.size**-0.5).softmax(-1) @ v
        else:
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
            mixed = torch.einsum("bhqk,bhkd->bhqd", scores, v)
        mixed = mixed.transpose(1, 2).reshape(b, h * w, self.heads * self.size)
        tokens = tokens + self.proj(mixed)
        return tokens.transpose(1, 2).reshape(b, c, h, w)


class Unknown(nn.Module):
    """What couples the channels in their order, so that none may go."""

    def __init__(self, width, rng):
        super().__init__()
        self.out = width
        self.way = rng.choice(["cumsum", "sort", "flip", "roll"])

    def forward(self, x):
        if self.way == "cumsum":
            return x.cumsum(1) / 4
        if self.way == "sort":
            return torch.sort(x, dim=1)[0]
        if self.way == "flip":
            return torch.flip(x, (1,))
        return torch.roll(x, 1, 1)


KNOWN = [Conv, Depthwise, Residual, Dense, Gate, Split, Shuffle, Attend]


class Network(nn.Module):
    def __init__(self, kinds, seed):
        super().__init__()
        rng = random.Random(seed)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        width, parts = 8, []
        for kind in kinds:
            parts.append(kind(width, rng))
            width = parts[-1].out
        self.parts = nn.Sequential(*parts)
        self.flat = rng.random() < 0.3
        self.head = nn.Linear(width * (4 if self.flat else 1), 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts(self.stem(x))
        x = F.adaptive_avg_pool2d(x, 2).flatten(1) if self.flat else x.mean((2, 3))
        return self.head(x)


def assert_sound(network: nn.Module, seed: int) -> Supernet:
    model = randomised(network.double(), pixels(8, SIZE))
    images = pixels(2, SIZE)
    one, other = model(images)
    assume(not torch.allclose(one, other, rtol=1e-2))  # nonlinearities may have cut all off
    net = Supernet.trace(model, images, divisor=1)
    assert_exact(net, SIZE, count=4, model=model)
    subnet = net.space.sample(random.Random(seed))
    net.train()
    small = net.extract(subnet)
    for call in (partial(net, images, subnet), partial(small, images)):
        out = call()
        (out.square().sum() + out[0, 1]).backward()
    assert_gradients_agree(net, small, subnet)
    assert_direct_gradients_agree(net, images, subnet)
    return net


#: Graphs of the two tests below: with every `make test`, and with `make test-models`.
COUNTS = [
    pytest.param(40, 20, id="some"),
    pytest.param(150, 50, id="many", marks=pytest.mark.models),
]

SEEDS = st.integers(0, 2**16)
KINDS = st.lists(st.sampled_from(KNOWN), max_size=4)


def generated(count):
    """The same input in every run, and no search for a smaller case: a seed is small enough."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("count", "_"), COUNTS)
def test_random_networks_are_exact(count, _):
    @generated(count)
    @given(KINDS, SEEDS)
    def check(kinds, seed):
        torch.manual_seed(seed)
        assert_sound(Network([Conv, *kinds], seed), seed)

    check()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("_", "count"), COUNTS)
def test_an_unknown_operation_among_them_freezes_and_reports(_, count):
    @generated(count)
    @given(KINDS, KINDS, SEEDS)
    def check(before, after, seed):
        torch.manual_seed(seed)
        net = assert_sound(Network([Conv, *before, Unknown, *after], seed), seed)
        assert net.frozen
        assert any("test_random_networks.py" in frozen.reason for frozen in net.frozen)

    check()
