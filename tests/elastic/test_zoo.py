"""Models that nobody wrote for us: traced as they are, or told exactly what stays as it is.

All of them with `make test-models`; a few with every `make test`. Every classifier of torchvision
and those of timm in `zoo.TIMM` run on reduced images, forward and one training step; the smallest
of each of torchvision's families also runs forward at its own image size.

Models of more than 100 million parameters run forward only, and their weights are there once: the
supernet is traced without data and takes over the tensors of the original. Their subnets are
drawn under a quarter of the cost, and the full one is not extracted, so that the largest model, of
5 GB in float64, is checked in 8 GB.
"""

import copy
import gc
import random
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from stp_ray.elastic import Budget, Subnet, Supernet

from .networks import pixels, randomised
from .same import assert_direct_gradients_agree, assert_gradients_agree, counted_macs
from .zoo import (
    FAMILIES,
    FULL_SIZE,
    TIMM,
    build,
    family,
    own_size,
    torchvision_model,
    torchvision_names,
)

pytestmark = pytest.mark.usefixtures("one_way_to_compute")

#: What every `make test` runs.
QUICK = {"googlenet", "mobilenet_v3_small", "swin_v2_t", "regnety_004", "deit_tiny_patch16_224"}

LARGE = 100_000_000

NAMES = [
    pytest.param(
        library, name, id=f"{library}-{name}", marks=[] if name in QUICK else pytest.mark.models
    )
    for library, names in (("torchvision", torchvision_names()), ("timm", TIMM))
    for name in names
]


def is_large(model: nn.Module) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) > LARGE


def traced(model: nn.Module, images: Tensor) -> Supernet:
    """The supernet of a model; that of a large one has no weights of its own."""
    if not is_large(model):
        return Supernet.trace(model, images)
    shapes = {id(p): nn.Parameter(p.to("meta")) for p in model.parameters()}
    net = Supernet.trace(copy.deepcopy(model, shapes).to("meta"), images)
    net.model.load_state_dict(model.state_dict(), assign=True)
    return net


def drawn(net: Supernet, count: int) -> list[Subnet]:
    """Random subnets, every other one under a random budget; of a large network all of them, and
    under at most a quarter of its MACs."""
    rng = random.Random(0)
    least, most = net.cost(net.space.smallest).macs / net.cost().macs, 1.0
    if large := is_large(net):
        most = 0.25
    budgets = [Budget(macs=rng.uniform(least, most)) for _ in range(count)]
    return [
        net.space.sample(rng, b if large or i % 2 == 0 else None) for i, b in enumerate(budgets)
    ]


@torch.no_grad()
def assert_subnets_are_exact(net: Supernet, images: Tensor, subnets: list[Subnet]) -> None:
    """Sliced run and extraction agree, prices are what is counted."""
    for subnet in subnets:
        small = net.extract(subnet)
        _, macs = counted_macs(small, images[:1])  # what a batch shares counts for each image
        out = small(images)
        cost = net.cost(subnet)
        assert (macs, sum(p.numel() for p in small.parameters())) == (cost.macs, cost.params)
        assert float((net(images, subnet) - out).abs().max()) <= 1e-10 * float(out.abs().max())
        del small
        gc.collect()


@torch.no_grad()
def assert_main_is_the_original(net: Supernet, model: nn.Module, images: Tensor) -> None:
    """To the bit, of outputs that depend on the image."""
    main = model(images)
    assert torch.equal(net(images), main)
    assert float((main[0] - main[1]).abs().max()) > 1e-3 * float(main.abs().max())


def assert_a_training_step_agrees(net: Supernet, images: Tensor, subnet: Subnet) -> None:
    """Output and gradients in training mode, of the slice and of its extraction."""
    net.train()
    small = net.extract(subnet)
    outputs = []
    for call in (partial(net, images, subnet), partial(small, images)):
        torch.manual_seed(3)  # the same dropout and the same paths
        out = call()
        outputs.append(out.detach())
        (out.square().sum() + out[0, 1]).backward()
    scale = float(outputs[1].abs().max())
    assert float((outputs[0] - outputs[1]).abs().max()) <= 1e-9 * scale
    assert_gradients_agree(net, small, subnet)
    assert_direct_gradients_agree(net, images, subnet)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("library", "name"), NAMES)
def test_a_model_of_others_is_exact(library, name):
    model, size = build(library, name)
    images = pixels(2, size)
    model = randomised(model, pixels(4, size, seed=1))
    net = traced(model, images[:1])
    assert_main_is_the_original(net, model, images)
    assert_subnets_are_exact(net, images, [*drawn(net, 10), net.space.smallest])
    if not is_large(model):
        assert_subnets_are_exact(net, images, [net.space.full])
        assert_a_training_step_agrees(net, images, drawn(net, 1)[0])


@pytest.mark.models
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_model_at_its_own_size_is_exact(name):
    torch.manual_seed(0)
    size = own_size(name)
    images = pixels(2, size)
    model = randomised(torchvision_model(name, size).double(), pixels(2, size, seed=1))
    net = traced(model, images[:1])
    assert_main_is_the_original(net, model, images)
    assert_subnets_are_exact(net, images[:1], drawn(net, 10))


def test_every_family_of_torchvision_has_a_member_at_its_own_size():
    assert {family(name) for name in torchvision_names()} == set(FAMILIES)
    assert {family(name) for name in FULL_SIZE} == set(FAMILIES) - {"vit_h"}  # a larger vit
