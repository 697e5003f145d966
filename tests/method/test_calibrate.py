import random
from types import MethodType

import pytest
import torch
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from stp_ray.elastic import Supernet
from stp_ray.elastic.supernet import StatsRecorder
from stp_ray.method import calibrate, relative_sparsity

from .networks import images_and_labels, left_as_it_was, supernet


def test_statistics_are_those_of_the_extracted_network():
    net = supernet().double()
    subnet = net.space.sample(random.Random(3))
    parts = images_and_labels(24)[0].double().split(8)
    stats = calibrate(net, subnet, parts)

    small = net.extract(subnet).train()
    norms = {name: m for name, m in small.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for images in parts:
            small(images)
    assert set(stats) == set(norms)
    for name, norm in norms.items():
        torch.testing.assert_close(stats[name]["running_mean"], norm.running_mean)
        torch.testing.assert_close(stats[name]["running_var"], norm.running_var)
    torch.testing.assert_close(net.eval()(parts[0], subnet, stats=stats), small.eval()(parts[0]))


def test_a_norm_that_has_a_hook_is_measured_anew_too():
    """It stays whole, but what reaches it is another distribution in every subnet."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).double()  # fmt: skip
    model[4].register_forward_hook(lambda *_: None)
    images = images_and_labels(24)[0].double()
    net = Supernet.trace(model, images, divisor=1)
    subnet = net.space.smallest
    stats = calibrate(net, subnet, images.split(8))
    assert set(stats) == {"1", "4"}
    small = net.extract(subnet, stats).eval()
    torch.testing.assert_close(net.eval()(images, subnet, stats=stats), small(images))

    recorder = StatsRecorder()
    net.train()(images, subnet, stats=recorder)  # measured in training mode too, as others are
    torch.testing.assert_close(
        recorder.stats()["4"], calibrate(net, subnet, [images])["4"], rtol=1e-6, atol=1e-9
    )
    net.eval()

    again = net.extract(subnet).train()
    for norm in (again.get_submodule("1"), again.get_submodule("4")):
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for part in images.split(8):
            again(part)
    torch.testing.assert_close(small(images), again.eval()(images))
    assert net.model.get_submodule("4").num_batches_tracked == 0


def test_a_norm_with_a_forward_of_its_own_is_left_alone():
    """Nobody knows what it does with its statistics."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )

    def centred(norm, x):
        return x - norm.running_mean.view(1, -1, 1, 1)

    model[1].forward = MethodType(centred, model[1])
    images = images_and_labels(8)[0]
    net = Supernet.trace(model, images, divisor=1)
    net.train()(images, net.space.smallest).sum().backward()
    assert calibrate(net, net.space.smallest, [images]) == {}


@pytest.mark.parametrize("training", [True, False])
def test_calibration_leaves_the_network_as_it_was(training):
    net = supernet(dropout=0.5).train(training)
    net.model.get_submodule("dropout").train(not training)
    images, _ = images_and_labels(16)
    subnet = net.space.uniform(0.5)
    with left_as_it_was(net):
        first = calibrate(net, subnet, images.split(8))
        torch.manual_seed(1)
        again = calibrate(net, subnet, images.split(8))  # no dropout
    assert first.keys() == again.keys() and first
    for name, stats in first.items():
        assert all(torch.equal(stats[key], again[name][key]) for key in stats)


def test_a_failing_batch_does_not_leave_the_network_in_eval_mode():
    net = supernet().train()
    with pytest.raises(RuntimeError):
        calibrate(net, net.space.full, [torch.zeros(2, 5, 8, 8)])
    assert net.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([[torch.zeros(2, 3, 8, 8), torch.zeros(2)]], "1 is list; .*images for images, _ in"),
        (torch.zeros(2, 3, 8, 8), r"1 is a tensor of shape \[3, 8, 8\]; .*a list of batches"),
        ([torch.zeros(0, 3, 8, 8)], r"1 is a tensor of shape \[0, 3, 8, 8\]"),
    ],
)
def test_batches_with_labels_or_a_batch_alone_are_refused(batches, words):
    net = supernet()
    with pytest.raises(ValueError, match=f"calibration batch {words}"):
        calibrate(net, net.space.full, batches)


def test_a_last_batch_of_one_image_is_named():
    model = nn.Sequential(nn.Conv2d(3, 8, 8), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 4))
    net = Supernet.trace(model, torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"batch 2 is one image, .*drop_last=True"):
        calibrate(net, net.space.smallest, [torch.rand(2, 3, 8, 8), torch.rand(1, 3, 8, 8)])


def test_statistics_of_another_subnet_are_refused():
    net = supernet().eval()
    images, _ = images_and_labels(4)
    half, full = net.space.uniform(0.5), net.space.full
    stats = calibrate(net, half, [images])
    name = next(iter(stats))
    for given in (stats, {}, {**calibrate(net, full, [images]), name: stats[name]}):
        with pytest.raises(ValueError, match=r"statistics of \S+ are .*calibrate this subnet"):
            net(images, full, stats=given)
        with pytest.raises(ValueError, match=r"statistics of \S+ are .*calibrate this subnet"):
            net.extract(full, given)


def test_nothing_to_calibrate():
    net = supernet(norm=False)
    assert calibrate(net, net.space.full, images_and_labels(4)[0].split(2)) == {}
    with pytest.raises(ValueError, match="calibration batches is 0; expected at least 1"):
        calibrate(supernet(), supernet().space.full, [])
    with pytest.raises(ValueError, match="batches are None; expected a list of tensors"):
        calibrate(supernet(), supernet().space.full, None)


def test_relative_sparsity_compares_channels_inside_and_outside():
    net = supernet()
    target = net.space.uniform(0.5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
    even = relative_sparsity(net, target)
    assert even["ratio"] == pytest.approx(1.0)
    assert even["kept_norm"] == pytest.approx(even["dropped_norm"])
    with torch.no_grad():
        for name, cuts in net.slices(target).items():
            weight = net.model.get_parameter(name)
            for dim, ((start, stop),) in cuts.items():
                weight.narrow(dim, start, stop - start).mul_(3.0)
    grown = relative_sparsity(net, target)
    assert grown["ratio"] > 1.5
    assert grown["kept_norm"] > even["kept_norm"]
    assert relative_sparsity(net, net.space.full) == {}


def test_relative_sparsity_leaves_out_layers_of_dropped_blocks():
    net = supernet()
    target = net.space.canonical(
        type(net.space.full)(net.space.uniform(0.5).widths, [net.space.blocks[0].name])
    )
    before = relative_sparsity(net, target)
    with torch.no_grad():
        for layer in net.space.blocks[0].layers:
            for parameter in net.model.get_submodule(layer).parameters():
                parameter.mul_(100.0)
    assert relative_sparsity(net, target) == before


def test_relative_sparsity_leaves_out_all_of_a_dropped_attention():
    """Whose output projection is a layer of its own within it."""
    model = VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)
    net = Supernet.trace(model, torch.zeros(1, 3, 32, 32))
    full = net.space.full
    block = next(b for b in net.space.blocks if any("attention" in name for name in b.layers))
    target = net.space.canonical(type(full)(full.widths, [block.name]))
    assert target.dropped == {block.name}
    assert relative_sparsity(net, target) == {}
