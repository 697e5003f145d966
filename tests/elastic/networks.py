"""Classifiers to trace: small models of a user's own, and weights that leave nothing symmetric."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stp_ray.elastic import Supernet


def line_of(file: str, text: str) -> int:
    """Where a file says `text` for the first time."""
    lines = Path(file).read_text().splitlines()
    return next(i for i, line in enumerate(lines, start=1) if text in line)


@torch.no_grad()
def randomised(model: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    """The model in eval mode with every parameter and statistic away from where initialisation
    leaves it (ones, zeros, equal values), so that each of them, and each image, shows in the
    output. `images` are what the running statistics are near to."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return drawn.to(tensor.dtype)

    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter += 0.2 * noise(parameter)
        elif not parameter.any():  # the head of torchvision's ViT, a class token
            parameter += noise(parameter) / parameter[0].numel() ** 0.5
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.running_mean is not None:
            norm.running_mean += 0.2 * norm.running_var.sqrt() * noise(norm.running_mean)
            norm.running_var *= 1 + 0.5 * torch.tanh(noise(norm.running_var))
    return model.eval()


def pixels(count: int, size: int = 8, seed: int = 0) -> Tensor:
    """Random images [count, 3, size, size] in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)


def supernet(model: nn.Module, size: int = 8, divisor: int | None = 1) -> Supernet:
    """The randomised model in float64 as a supernet."""
    model = randomised(model.double(), pixels(8, size))
    return Supernet.trace(model, pixels(2, size), divisor=divisor)


class Bottle(nn.Module):
    """A residual block with a hidden width."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.up = nn.Conv2d(hidden, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.up(F.relu(self.bn1(self.down(x))))))


class Own(nn.Module):
    """What a user may write: three residual blocks, a block of dense concatenations, a grouped
    and a depthwise convolution, squeeze and excitation, dropout by function, a flattened head,
    and an argument that has a default."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.Sequential(Bottle(12, 8), Bottle(12, 10), Bottle(12, 6))
        self.dense1 = nn.Conv2d(12, 6, 3, padding=1)
        self.dense2 = nn.Conv2d(18, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(22)
        self.depthwise = nn.Conv2d(22, 22, 3, stride=2, padding=1, groups=22)
        self.mix = nn.Conv2d(22, 16, 1)
        self.squeeze = nn.Linear(16, 4)
        self.excite = nn.Linear(4, 16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(8, 24)
        self.scale = nn.Parameter(torch.ones(24, 1, 1))
        self.head = nn.Linear(24 * 4, classes)

    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        x = self.blocks(F.relu(self.stem(x), inplace=True))
        x = torch.cat([x, self.dense1(x).relu()], dim=1)
        x = torch.cat([x, self.dense2(x).relu()], dim=1)
        x = self.mix(self.depthwise(self.bn(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = x * gate[:, :, None, None]
        x = F.max_pool2d(F.gelu(self.norm(self.grouped(x))) * self.scale, 2)
        x = torch.flatten(x, 1)
        x = F.dropout(x, 0.5, training=self.training)
        return x if features else self.head(x)


class Attention(nn.Module):
    """Self-attention and an MLP as papers' code writes them, sizes read off the tensors."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).chunk(3)
        scores = torch.matmul(q, k.transpose(-2, -1)) * k.shape[-1] ** -0.5
        mixed = (scores.softmax(dim=-1) @ v).squeeze(0).transpose(1, 2).reshape(b, n, c)
        x = x + self.drop(self.proj(mixed))
        return x + self.gamma * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Tokens(nn.Module):
    """A small vision transformer of a user's own."""

    def __init__(self, classes: int = 5, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, 17, width))
        self.layers = nn.Sequential(Attention(width, heads), Attention(width, heads))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.places
        return self.head(self.layers(x)[:, 0])


class Written(nn.Module):
    """A convolution of 8 channels, what a test writes, and a linear head.

    Args:
        between: what happens to [B, 8, H, W]; gets the module itself first.
        layers: submodules and parameters by name.
        width: channels that reach the head.
    """

    def __init__(
        self,
        between: Callable[["Written", Tensor], Tensor],
        width: int = 8,
        **layers: nn.Module | nn.Parameter,
    ) -> None:
        super().__init__()
        self.between = between
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self, self.stem(x)).mean((2, 3)))
