"""Whether a supernet, its extractions and its prices agree."""

import random

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stp_ray.elastic import Subnet, Supernet
from stp_ray.elastic.attention import unfused_attention

from .networks import pixels


def counted_macs(module: nn.Module, images: Tensor) -> tuple[Tensor, float]:
    """The output, and the MACs per image that PyTorch's counter finds, which does not see into
    fused attention."""
    with unfused_attention(), FlopCounterMode(display=False) as counter:
        out = module(images)
    return out, counter.get_total_flops() / 2 / len(images)


def subnets_of(net: Supernet, count: int) -> list[Subnet]:
    """Random subnets, the smallest, the full one, and those with one block dropped."""
    rng = random.Random(0)
    drops = [
        net.space.canonical(Subnet(net.space.full.widths, [block.name]))
        for block in net.space.blocks
    ]
    drawn = [net.space.sample(rng) for _ in range(count)]
    return [*drawn, net.space.smallest, net.space.full, *drops]


@torch.no_grad()
def assert_exact(
    net: Supernet, size: int = 8, count: int = 10, model: nn.Module | None = None
) -> None:
    """Sliced run and extraction agree in float64, prices are what is counted, and the main
    network is `model` to the bit."""
    net.eval()
    images = pixels(2, size)
    main = net(images)
    assert not torch.allclose(main[0], main[1], rtol=1e-3)
    if model is not None:
        assert torch.equal(main, model.eval()(images.clone()))
    for subnet in subnets_of(net, count):
        small = net.extract(subnet)
        out, macs = counted_macs(small, images)
        assert float((net(images, subnet) - out).abs().max()) <= 1e-10 * float(out.abs().max())
        cost = net.cost(subnet)
        assert (macs, sum(p.numel() for p in small.parameters())) == (cost.macs, cost.params)


def assert_gradients_agree(net: Supernet, small: nn.Module, subnet: Subnet) -> None:
    """What the slice kept has the extraction's gradient, what it dropped has none."""
    theirs = {name: p.grad for name, p in small.named_parameters()}
    cuts = net.slices(subnet)
    for name, parameter in net.model.named_parameters():
        if theirs.get(name) is None:  # in a dropped block
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        grad, dropped = parameter.grad, parameter.grad.clone()
        places = [torch.arange(size) for size in grad.shape]
        for dim, ranges in cuts.get(name, {}).items():
            places[dim] = torch.cat([torch.arange(*bounds) for bounds in ranges])
        kept = grad[torch.meshgrid(*places, indexing="ij")]
        dropped[torch.meshgrid(*places, indexing="ij")] = 0
        assert kept.shape == theirs[name].shape, name
        largest = max(float(theirs[name].abs().max()), 1e-8)
        assert float((kept - theirs[name]).abs().max()) <= 1e-9 * largest, name
        assert not dropped.any(), name


def assert_direct_gradients_agree(net: Supernet, images: Tensor, subnet: Subnet) -> None:
    """A direct backward pass adds what autograd adds, to gradients that are there already."""
    found = []
    for direct in (False, True):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.manual_seed(3)
        out = net(images, subnet, direct=direct)
        (out.square().sum() + out[0, 1]).backward()
        found.append({name: p.grad for name, p in net.named_parameters()})
    net.zero_grad()
    for name, expected in found[0].items():
        largest = max(float((expected - 1).abs().max()), 1e-3)
        assert float((found[1][name] - expected).abs().max()) <= 1e-9 * largest, name
