"""Small networks to train in tests, and batches for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stp_ray.elastic import Supernet


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(x + self.bn2(self.conv2(y)))


class Residual(nn.Module):
    """Two residual blocks on 8 channels, dropout, three classes."""

    def __init__(self, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential(Block(8), Block(8)) if norm else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.norm(self.stem(x))))
        return self.head(self.dropout(torch.flatten(self.pool(x), 1)))


def supernet(dropout: float = 0.0, norm: bool = True, seed: int = 0) -> Supernet:
    torch.manual_seed(seed)
    return Supernet.trace(Residual(dropout, norm), torch.zeros(2, 3, 8, 8), divisor=1)


@contextmanager
def left_as_it_was(net: Supernet) -> Iterator[None]:
    """Modes, weights and buffers are the same afterwards, to the bit, and there is no gradient."""
    modes = {name: m.training for name, m in net.named_modules()}
    before = {name: t.clone() for name, t in net.state_dict().items()}
    yield
    assert {name: m.training for name, m in net.named_modules()} == modes
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in net.parameters())
    assert torch.is_grad_enabled()


def images_and_labels(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose class is the colour channel that is brightest."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    images[torch.arange(count), labels] += 0.7
    return images, labels


def batches(
    steps_per_epoch: int, size: int = 16, soft: bool = False
) -> Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]:
    """Batches that depend on (epoch, step) alone, as those of the data layer do."""

    def of(epoch: int, first_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(first_step, steps_per_epoch):
            images, labels = images_and_labels(size, seed=1 + epoch * steps_per_epoch + step)
            yield images, torch.eye(3)[labels] * 0.8 + 0.2 / 3 if soft else labels

    return of
