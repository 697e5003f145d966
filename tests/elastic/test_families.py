"""Every model family: run as a slice, extracted and priced, a subnet is one and the same."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import VisionTransformer

from stp_ray.elastic import Budget, Subnet, Supernet
from stp_ray.method import calibrate
from stp_ray.models import build_model

from .networks import Own, Tokens, pixels, randomised
from .same import assert_direct_gradients_agree, assert_gradients_agree, counted_macs

pytestmark = pytest.mark.usefixtures("one_way_to_compute")

#: Small ones, of full depth: builder, image size.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (partial(build_model, "resnet20", num_classes=10), 16),
    "resnet56": (partial(build_model, "resnet56", num_classes=10), 16),
    "resnet110": (partial(build_model, "resnet110", num_classes=10), 8),
    "resnet18": (partial(models.resnet18, num_classes=10), 32),
    "resnet34": (partial(models.resnet34, num_classes=10), 32),
    "resnet50": (partial(models.resnet50, num_classes=10), 32),
    "resnet101": (partial(models.resnet101, num_classes=10), 32),
    "mobilenet_v2": (partial(models.mobilenet_v2, num_classes=10), 32),
    "vit_b_16": (partial(VisionTransformer, 32, 8, 12, 12, 192, 384, num_classes=10), 32),
    "swin_t": (partial(models.swin_t, num_classes=10), 64),
    "own": (Own, 8),
    "own_tokens": (Tokens, 8),
}

#: Full ones: name, image size, number of axes and of droppable blocks.
FULL = [
    ("resnet20", 32, 12, 7),
    ("resnet56", 32, 30, 25),
    ("resnet110", 32, 57, 52),
    ("resnet18", 224, 12, 5),
    ("resnet34", 224, 20, 13),
    ("resnet50", 224, 37, 12),
    ("resnet101", 224, 71, 29),
    ("mobilenet_v2", 224, 25, 10),
    ("vit_b_16", 224, 25, 24),
    ("swin_t", 224, 28, 24),
]


@dataclass(frozen=True)
class Family:
    model: nn.Module
    net: Supernet
    images: Tensor
    before: dict[str, Tensor]  # the model's state before it was traced


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    build, size = FAMILIES[request.param]
    torch.manual_seed(0)
    model = randomised(build().double(), pixels(8, size, seed=1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = pixels(2, size)
    return Family(model, Supernet.trace(model, images[:1]), images, before)


def chained(net: Supernet) -> list[Subnet]:
    """Subnets that drop blocks in a row: all of them, the first half, the second half."""
    names = [block.name for block in net.space.blocks]
    half = len(names) // 2
    widths = net.space.uniform(0.6).widths
    return [net.space.canonical(Subnet(widths, d)) for d in (names, names[:half], names[half:])]


def drawn(net: Supernet, count: int, seed: int = 0) -> list[Subnet]:
    """Random subnets, every other one under a budget."""
    rng = random.Random(seed)
    least = net.cost(net.space.smallest).macs / net.cost().macs
    budgets = [None if i % 2 else Budget(macs=rng.uniform(least, 1)) for i in range(count)]
    return [net.space.sample(rng, budget) for budget in budgets]


def assert_same(one: Tensor, other: Tensor, spread: float = 1e-3) -> None:
    """Equal up to rounding, where two images differ in their outputs by far more than that.

    `spread` is their least difference (relative; 0: they may not differ at all)."""
    largest = float(other.abs().max())
    assert float((one - other).abs().max()) <= 1e-10 * largest
    found = float((other[0] - other[1]).abs().max()) / largest
    assert found > spread if spread else found == 0


def sees(net: Supernet, subnet: Subnet) -> bool:
    """Whether the output can depend on the image: a class token without attention learns nothing
    of it."""
    attention = {
        block.name
        for block in net.space.blocks
        if any(layer.endswith(("self_attention", "qkv")) for layer in block.layers)
    }
    return not attention or not attention <= subnet.dropped


@torch.no_grad()
def test_a_slice_is_its_extraction_and_costs_what_is_counted(family):
    net, images = family.net.eval(), family.images
    assert_same(net(images), family.model(images))
    subnets = [*drawn(net, 20), *chained(net), net.space.smallest, net.space.full]
    assert len(set(subnets)) >= 20
    assert any(len(subnet.dropped) > 1 for subnet in subnets) or len(net.space.blocks) < 2
    for subnet in subnets:
        small = net.extract(subnet)
        out, macs = counted_macs(small, images)
        # Statistics of the whole network shrink the signal of a narrow one.
        assert_same(net(images, subnet), out, 1e-7 if sees(net, subnet) else 0)
        cost = net.cost(subnet)
        assert macs == cost.macs
        assert sum(p.numel() for p in small.parameters()) == cost.params


@torch.no_grad()
def test_a_slice_is_its_extraction_with_calibrated_statistics(family):
    net, images = family.net.eval(), family.images
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    more = pixels(4, images.shape[-1], seed=2).split(2)
    for subnet in [*drawn(net, 20, seed=1), *chained(net)]:
        stats = calibrate(net, subnet, more)
        if not norms:
            assert stats == {}
            return
        small = net.extract(subnet, stats)
        out = small(images)
        assert_same(net(images, subnet, stats=stats), out)
        for name, found in stats.items():
            assert torch.equal(small.get_submodule(name).running_mean, found["running_mean"])


def test_training_a_slice_is_training_its_extraction(family):
    net, images = family.net.train(), family.images
    buffers = {name: tensor.clone() for name, tensor in net.named_buffers()}
    for subnet in [*drawn(net, 2, seed=2), chained(net)[1]]:
        small = net.extract(subnet)
        assert small.training
        outputs = []
        for call in (partial(net, images, subnet), partial(small, images)):
            torch.manual_seed(3)  # the same dropout and the same paths
            out = call()
            outputs.append(out.detach())
            (out.square().sum() + out[0, 1]).backward()
        assert_same(*outputs)
        for name, tensor in net.named_buffers():
            assert torch.equal(tensor, buffers[name]), name
        assert_gradients_agree(net, small, subnet)
        assert_direct_gradients_agree(net, images, subnet)
    net.eval()


def test_the_main_network_is_the_original_to_the_bit(family):
    net, model, images = family.net, family.model, family.images
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, family.before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    mine, theirs = net.model.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.data_ptr() != theirs[name].data_ptr()
    with torch.no_grad():
        assert torch.equal(net.eval()(images), model(images))
    net.load_state_dict({f"model.{name}": tensor for name, tensor in theirs.items()})


@torch.no_grad()
def test_extraction_leaves_the_supernet_alone(family):
    net, images = family.net.eval(), family.images
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    memory = {tensor.untyped_storage().data_ptr() for tensor in net.state_dict().values()}
    for subnet in (net.space.full, drawn(net, 1, seed=4)[0]):
        small = net.extract(subnet)
        out = net(images, subnet)
        small_state = small.state_dict()
        assert set(small_state) <= set(net.model.state_dict())
        for tensor in small_state.values():
            assert tensor.untyped_storage().data_ptr() not in memory
            assert tensor.is_contiguous()
            tensor.zero_()
        assert torch.equal(net(images, subnet), out)
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert not any(module.training for module in small.modules())


@pytest.mark.parametrize(("name", "size", "axes", "blocks"), FULL)
def test_full_size_is_elastic_everywhere_and_priced_exactly(name, size, axes, blocks):
    with torch.device("meta"):
        model = build_model(name, num_classes=1000, image_size=size).eval()
        images = torch.empty(2, 3, size, size)
        net = Supernet.trace(model, images)
        assert net.frozen == ()
        assert (len(net.space.axes), len(net.space.blocks)) == (axes, blocks)
        with torch.no_grad():
            subnets = [net.space.full, net.space.smallest, *drawn(net, 4)]
            for module, cost in [
                (model, net.cost()),
                *((net.extract(subnet), net.cost(subnet)) for subnet in subnets),
            ]:
                assert counted_macs(module, images)[1] == cost.macs
                assert sum(p.numel() for p in module.parameters()) == cost.params
