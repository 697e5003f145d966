import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stp_ray.method import Teacher, cross_entropy, kl_divergence

from .networks import Residual, images_and_labels


@given(weight=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_learning_the_labels_is_learning_from_both(weight, seed):
    images, labels = images_and_labels(6, seed)
    teacher = Teacher(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)), weight)
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    said = teacher.network(images)
    both = (1 - weight) * cross_entropy(logits, labels) + weight * kl_divergence(said, logits)
    (expected,) = torch.autograd.grad(both, logits)
    (found,) = torch.autograd.grad(cross_entropy(logits, teacher(images, labels)), logits)
    torch.testing.assert_close(found, expected)


@given(weight=st.floats(0.01, 1))
def test_labels_stay_distributions(weight):
    images, labels = images_and_labels(5)
    teacher = Teacher(Residual(), weight)
    soft = torch.eye(3)[labels] * 0.8 + 0.2 / 3
    for found in (teacher(images, labels), teacher(images, soft)):
        assert found.shape == (5, 3)
        assert (found >= 0).all()
        torch.testing.assert_close(found.sum(dim=1), torch.ones(5))


def test_the_teacher_stays_as_it_is():
    network = Residual(dropout=0.5).train()
    teacher = Teacher(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, labels = images_and_labels(8)
    first = teacher(images, labels)
    assert torch.equal(first, teacher(images, labels))  # its dropout is off
    assert not first.requires_grad
    assert not any(parameter.requires_grad for parameter in network.parameters())
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("weight", [0, -0.1, 1.1, float("nan")])
def test_a_part_is_a_part(weight):
    with pytest.raises(ValueError, match=r"weight is .*expected in"):
        Teacher(Residual(), weight)
