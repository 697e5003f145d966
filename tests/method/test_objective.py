import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from stp_ray.method import (
    DenseObjective,
    Expansion,
    ExpansionObjective,
    Stimulation,
    StimulativeObjective,
    alpha_divergence,
    cross_entropy,
    kl_divergence,
)

from . import networks
from .networks import Residual, images_and_labels


def supernet():
    """One that is sure of what it says: else its subnets say the same, and no divergence shows."""
    net = networks.supernet()
    with torch.no_grad():
        net.model.get_parameter("head.weight").mul_(10)
    return net


logits = st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**32)).map(
    lambda drawn: 3 * torch.randn(*drawn[:2], generator=torch.Generator().manual_seed(drawn[2]))
)


@given(logits, st.floats(0.25, 8), st.booleans(), st.integers(0, 2**32))
def test_kl_is_zero_at_equality_and_never_negative(teacher, temperature, direction, seed):
    student = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(seed))
    assert kl_divergence(teacher, teacher.clone(), temperature, direction).item() == 0
    assert kl_divergence(teacher, student, temperature, direction).item() >= -1e-6 * temperature**2


@given(logits, st.floats(0.5, 4))
def test_kl_is_the_mean_over_samples_times_the_squared_temperature(teacher, temperature):
    student = teacher.flip(1).double()
    teacher = teacher.double()
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    wanted = (p * (p / q).log()).sum(1).mean() * temperature**2
    torch.testing.assert_close(kl_divergence(teacher, student, temperature), wanted)


@given(logits, st.floats(0.1, 10))
def test_kl_of_directions_does_not_see_the_length_of_logits(teacher, factor):
    student = teacher.flip(1)
    torch.testing.assert_close(
        kl_divergence(teacher, student, direction=True),
        kl_divergence(factor * teacher, student / factor, direction=True),
    )


@given(logits, st.floats(0.5, 4), st.floats(1, 100))
def test_alpha_divergence_is_zero_at_equality_and_at_least_kl(teacher, temperature, clip):
    student = teacher.flip(1).requires_grad_()
    found = alpha_divergence(teacher, student, temperature, clip=clip)
    kl = kl_divergence(teacher, student, temperature)
    assert found.item() >= kl.item() - 1e-5 * temperature**2
    same = teacher.clone().requires_grad_()
    none = alpha_divergence(teacher, same, temperature, clip=clip)
    none.backward()
    assert abs(none.item()) <= 1e-5 * temperature**2
    torch.testing.assert_close(same.grad, torch.zeros_like(teacher), atol=1e-5, rtol=0)


@given(logits, st.floats(0.5, 4))
def test_unclipped_alpha_divergence_is_the_larger_of_two_with_its_gradient(teacher, temperature):
    teacher = teacher.double()
    student = teacher.roll(1, 1).mul(0.7).requires_grad_()
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    kl, other = (p * (p / q).log()).sum(1), ((q**2 / p).sum(1) - 1) / 2
    wanted = torch.maximum(kl, other).mean() * temperature**2
    (slope,) = torch.autograd.grad(wanted, student)
    found = alpha_divergence(teacher, student, temperature, clip=float("inf"))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], slope)


def test_alpha_divergence_punishes_what_the_student_alone_thinks_likely_within_a_limit():
    teacher = torch.tensor([[0.9, 0.09, 0.01]]).log()
    spread = torch.tensor([[0.5, 0.3, 0.2]]).log()
    clipped = torch.tensor((0.5 * 5 / 9 + 0.3 * 10 / 3 + 0.2 * 5 - 1) / 2)  # 0.2 / 0.01 is too much
    torch.testing.assert_close(alpha_divergence(teacher, spread), clipped)
    assert clipped > kl_divergence(teacher, spread)
    left_out = torch.tensor([[0.998, 0.001, 0.001]]).log()  # where KL is the larger
    torch.testing.assert_close(
        alpha_divergence(teacher, left_out), kl_divergence(teacher, left_out)
    )
    extreme = torch.tensor([[300.0, 0.0, 0.0]], requires_grad=True)
    found = alpha_divergence(torch.tensor([[0.0, 300.0, 0.0]]), extreme)
    found.backward()
    assert found.isfinite()
    assert extreme.grad.abs().max() <= 5


def test_kl_gives_the_teacher_no_gradient_and_is_precise_in_half_precision():
    teacher = torch.randn(4, 3, requires_grad=True)
    student = torch.randn(4, 3, requires_grad=True)
    kl_divergence(teacher, student).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert kl_divergence(teacher.bfloat16(), student.bfloat16()).dtype == torch.float32
    assert cross_entropy(student.bfloat16(), torch.tensor([0, 1, 2, 0])).dtype == torch.float32


def test_dense_objective_is_cross_entropy_with_class_or_soft_labels():
    torch.manual_seed(0)
    model = Residual().eval()
    images, labels = images_and_labels(6)
    wanted = F.cross_entropy(model(images), labels, label_smoothing=0.1)
    objective = DenseObjective(model, 0.1)
    torch.testing.assert_close(objective(images, labels)["loss"], wanted)
    soft = F.one_hot(labels, 3).float()
    torch.testing.assert_close(objective(images, soft)["loss"], wanted)
    assert objective(images, soft.double())["loss"].isfinite()


def test_stimulative_loss_is_ce_of_main_plus_the_mean_kl_of_subnets():
    net = supernet().eval()
    images, labels = images_and_labels(6)
    subnets = [net.space.sample(random.Random(seed)) for seed in range(3)]
    options = Stimulation(kd_weight=0.5, temperature=2.0)
    parts = StimulativeObjective(net, options)(images, labels, subnets)
    main = net(images)
    ce = F.cross_entropy(main, labels)
    kd = sum(kl_divergence(main, net(images, s), 2.0) for s in subnets) / 3
    torch.testing.assert_close(parts["loss"], ce + 0.5 * kd)
    torch.testing.assert_close(parts["ce"], ce)
    torch.testing.assert_close(parts["kd"], kd)
    assert not parts["ce"].requires_grad
    assert not parts["kd"].requires_grad


def test_stimulation_holds_subnets_to_main_by_the_divergence_it_is_told():
    net = supernet().eval()
    images, labels = images_and_labels(6)
    subnet = net.space.sample(random.Random(0))
    options = Stimulation(divergence="alpha", temperature=2.0)
    parts = StimulativeObjective(net, options)(images, labels, [subnet])
    wanted = alpha_divergence(net(images), net(images, subnet), 2.0)
    torch.testing.assert_close(parts["kd"], wanted.detach())
    assert parts["kd"] >= kl_divergence(net(images), net(images, subnet), 2.0)


@pytest.mark.parametrize("direction", [False, True])
def test_stimulation_smooths_labels_and_compares_directions_where_told(direction):
    net = supernet().eval()
    images, labels = images_and_labels(6)
    subnet = net.space.uniform(0.5)
    options = Stimulation(direction=direction, temperature=2.0)
    parts = StimulativeObjective(net, options, 0.1)(images, labels, [subnet])
    main, small = net(images), net(images, subnet)
    ce = F.cross_entropy(main, labels, label_smoothing=0.1)
    torch.testing.assert_close(parts["loss"], ce + kl_divergence(main, small, 2.0, direction))


def test_main_network_learns_from_labels_alone():
    net = supernet()
    images, labels = images_and_labels(6)
    objective = StimulativeObjective(net, Stimulation())
    head = net.model.get_parameter("head.weight")
    objective(images, labels, [])["loss"].backward()
    alone = head.grad.clone()
    net.zero_grad()
    # a subnet equal to the main network adds KL = 0, whose gradient vanishes
    objective(images, labels, [net.space.full])["loss"].backward()
    torch.testing.assert_close(head.grad, alone, atol=1e-6, rtol=1e-5)


def test_subnets_leave_the_running_statistics_of_the_main_network():
    nets = supernet(), supernet()
    images, labels = images_and_labels(6)
    subnets = [nets[0].space.sample(random.Random(1))]
    for net, drawn in zip(nets, ([], subnets), strict=True):
        StimulativeObjective(net.train(), Stimulation())(images, labels, drawn)
    for (name, one), (_, other) in zip(
        nets[0].named_buffers(), nets[1].named_buffers(), strict=True
    ):
        assert torch.equal(one, other), name


def test_each_subnet_sees_the_original_images_at_a_scale_drawn_for_it():
    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 3))
            self.seen = []

        def forward(self, images, subnet=None, direct=False):
            self.seen.append(images)
            return images.mean((2, 3)) @ self.weight

    images, labels = images_and_labels(4)
    spy = Spy()
    objective = StimulativeObjective(spy, Stimulation(subnets=6, resolutions=(1.0, 0.5)))
    torch.manual_seed(0)
    objective(images, labels, [object()] * 12)
    main, *seen = spy.seen
    half = F.interpolate(images, size=(4, 4), mode="bilinear", antialias=True)
    assert torch.equal(main, images)
    assert {tuple(x.shape[-2:]) for x in seen} == {(8, 8), (4, 4)}
    for x in seen:
        assert torch.equal(x, images if x.shape[-1] == 8 else half)
    first, spy.seen = [x.shape for x in spy.seen], []
    torch.manual_seed(0)
    objective(images, labels, [object()] * 12)
    assert [x.shape for x in spy.seen] == first


def gradients(net, objective, batch, subnets, backward):
    """Names the loss and all gradients of a step, from gradients of one."""
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    parts = objective(*batch, subnets, backward)
    if backward is None:
        parts["loss"].backward()
    return {**parts, **{name: p.grad for name, p in net.named_parameters()}}


@pytest.mark.parametrize(
    "options",
    [
        Stimulation(kd_weight=0.7, temperature=2.0),
        Expansion(kd_weight=0.7, target_ce=0.4),
        Expansion(kd_weight=0.7, main="drop"),
    ],
    ids=["stimulation", "expansion", "expansion without main"],
)
def test_subnet_by_subnet_and_all_at_once_are_the_same_step(options):
    net = supernet().double().train()
    target, subnets = ladder_of(net, rungs=3)
    objective = (
        StimulativeObjective(net, options)
        if isinstance(options, Stimulation)
        else ExpansionObjective(net, target, options)
    )
    images, labels = images_and_labels(6)
    batch = images.double(), labels
    at_once = gradients(net, objective, batch, subnets, None)
    one_by_one = gradients(net, objective, batch, subnets, lambda loss: loss.backward())
    assert at_once.keys() == one_by_one.keys()
    for name, expected in at_once.items():
        assert torch.allclose(one_by_one[name], expected, rtol=1e-9, atol=1e-9), name
    names = dict(net.named_parameters())
    assert any((at_once[name] != 1).any() for name in names)


def ladder_of(net, rungs=2):
    """A target and the subnets above it, the largest first, that all answer differently."""
    target, *expanded = (net.space.uniform(k / (rungs + 2)) for k in range(1, rungs + 2))
    return target, expanded[::-1]


def test_expansion_loss_goes_down_the_ladder():
    net = supernet().eval()
    images, labels = images_and_labels(6)
    target, expanded = ladder_of(net)
    options = Expansion(target_ce=0.3, kd_weight=0.7, rungs=2)
    objective = ExpansionObjective(net, target, options)
    parts = objective(images, labels, expanded)
    main, first, second = net(images), *(net(images, e) for e in expanded)
    small = net(images, target)
    ce, ce_target = F.cross_entropy(main, labels), F.cross_entropy(small, labels)
    kd = kl_divergence(main, first) + kl_divergence(first, second)
    kd_target = kl_divergence(second, small)
    torch.testing.assert_close(parts["loss"], ce + 0.3 * ce_target + 0.7 * (kd + kd_target))
    torch.testing.assert_close(parts["kd_target"], kd_target)
    assert objective.uses_all_parameters


@pytest.mark.parametrize("main", ["train", "drop"])
def test_expansion_weighs_each_of_several_rungs(main):
    net = supernet().eval()
    images, labels = images_and_labels(6)
    target, (large, small) = ladder_of(net)
    options = Expansion(main=main, rungs=2, target_ce=0.3, kd_weight=0.7, temperature=2.0)
    found = ExpansionObjective(net, target, options, 0.1)(images, labels, [large, small])

    def ce(logits):
        return F.cross_entropy(logits, labels, label_smoothing=0.1)

    def kl(teacher, student):
        return kl_divergence(teacher, student, 2.0)

    top, upper, lower, bottom = (net(images, subnet) for subnet in (None, large, small, target))
    if main == "train":
        wanted = ce(top) + 0.7 * (kl(top, upper) + kl(upper, lower))
    else:  # the expanded ones learn the labels, together as much as the main network would
        wanted = (ce(upper) + ce(lower)) / 2 + 0.7 * kl(upper, lower)
    wanted = wanted + 0.7 * kl(lower, bottom) + 0.3 * ce(bottom)
    torch.testing.assert_close(found["loss"], wanted)


def test_expansion_without_rungs_distils_from_the_main_network():
    net = supernet().eval()
    images, labels = images_and_labels(6)
    target, _ = ladder_of(net)
    parts = ExpansionObjective(net, target, Expansion(rungs=0, target_ce=0.0))(images, labels, [])
    main = net(images)
    wanted = F.cross_entropy(main, labels) + kl_divergence(main, net(images, target))
    torch.testing.assert_close(parts["loss"], wanted)


def test_expansion_that_dropped_the_main_network_trains_only_the_expanded_one():
    net = supernet().train()
    images, labels = images_and_labels(6)
    target = net.space.smallest
    objective = ExpansionObjective(net, target, Expansion(main="drop"))
    assert not objective.uses_all_parameters
    expanded = net.space.uniform(0.5)
    objective(images, labels, [expanded])["loss"].backward()
    outside = net.model.get_parameter("blocks.0.conv1.weight").grad
    kept = expanded.widths
    assert any(width < axis.size for axis, width in zip(net.space.axes, kept.values(), strict=True))
    assert outside[-1].abs().max() == 0
    assert outside[0, 0].abs().max() > 0


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("main", ["train", "drop"])
def test_a_rung_equal_to_the_target_can_be_left_out(main, direct):
    """Neither loss nor gradients change, and the parts keep their names."""
    net = supernet().double().train()
    target, (larger, _) = ladder_of(net)
    objective = ExpansionObjective(net, target, Expansion(kd_weight=0.7, target_ce=0.4, main=main))
    images, labels = images_and_labels(6)
    batch = images.double(), labels
    backward = (lambda loss: loss.backward()) if direct else None
    cases = [([target], [])]
    if main == "train":
        cases.append(([larger, target], [larger]))
    for with_equal, without in cases:
        found = gradients(net, objective, batch, without, backward)
        expected = gradients(net, objective, batch, with_equal, backward)
        assert list(found) == list(expected)
        distilled = found.pop("kd") + found.pop("kd_target")
        torch.testing.assert_close(distilled, expected["kd"] + expected["kd_target"])
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_expansion_alone_on_the_target_learns_the_labels_and_nothing_outside():
    net = supernet().train()
    images, labels = images_and_labels(6)
    target = net.space.smallest
    objective = ExpansionObjective(net, target, Expansion(main="drop", target_ce=0.4))
    parts = objective(images, labels, [], lambda loss: loss.backward())
    ce = F.cross_entropy(net(images, target), labels)
    torch.testing.assert_close(parts["loss"], 1.4 * ce.detach())
    assert parts["kd"] == parts["kd_target"] == 0
    torch.testing.assert_close(parts["ce"], parts["ce_target"])
    grad = net.model.get_parameter("blocks.0.conv1.weight").grad
    assert grad is None or grad[-1].abs().max() == 0
    assert net.model.get_parameter("head.weight").grad.abs().max() > 0
