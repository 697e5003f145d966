"""Models that nobody wrote for us: traced as they are, or told exactly what stays as it is.

All of them with `make test-models`; a few with every `make test`.
"""

import random
from functools import partial

import pytest
import torch

from stp_ray.elastic import Budget, Supernet

from .networks import pixels, randomised
from .same import assert_gradients_agree, counted_macs
from .zoo import TIMM, TORCHVISION, build

pytestmark = pytest.mark.usefixtures("one_way_to_compute")

#: What every `make test` runs.
QUICK = {"googlenet", "mobilenet_v3_small", "swin_v2_t", "regnety_004", "deit_tiny_patch16_224"}

NAMES = [
    pytest.param(
        library, name, id=f"{library}-{name}", marks=[] if name in QUICK else pytest.mark.models
    )
    for library, zoo in (("torchvision", TORCHVISION), ("timm", TIMM))
    for name in zoo
]


def drawn(net, count):
    rng = random.Random(0)
    least = net.cost(net.space.smallest).macs / net.cost().macs
    budgets = [None if i % 2 else Budget(macs=rng.uniform(least, 1)) for i in range(count)]
    return [net.space.sample(rng, budget) for budget in budgets]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("library", "name"), NAMES)
def test_a_model_of_others_is_exact(library, name):
    model, size = build(library, name)
    images = pixels(2, size)
    model = randomised(model, pixels(4, size, seed=1))
    net = Supernet.trace(model, images[:1])
    with torch.no_grad():
        main = model(images)
        assert torch.equal(net(images), main)
        assert float((main[0] - main[1]).abs().max()) > 1e-3 * float(main.abs().max())
        for subnet in [*drawn(net, 10), net.space.smallest, net.space.full]:
            small = net.extract(subnet)
            _, macs = counted_macs(small, images[:1])
            cost = net.cost(subnet)
            assert (macs, sum(p.numel() for p in small.parameters())) == (cost.macs, cost.params)
            out = small(images)
            assert float((net(images, subnet) - out).abs().max()) <= 1e-10 * float(out.abs().max())
    subnet = drawn(net, 1)[0]
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
