"""Networks to write, and what is said of one."""

import torch
from torch import nn


class Small(nn.Module):
    """Convolution, BatchNorm, a residual addition and a flattening that keeps the batch free."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.branch = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        x = torch.relu(self.norm(self.stem(images)))
        x = torch.relu(x + self.branch(x))
        return self.head(x.mean((2, 3)))


class BakedBatch(nn.Module):
    """Only ever answers for two images."""

    def forward(self, images):
        return images.reshape(2, -1)[:, :4]


class Stateful(nn.Module):
    """Its exported form is a different function: the module scales by what it counts."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return images.flatten(1)[:, :4] * self.calls


DESCRIPTION = {
    "model": {"name": "resnet20", "kwargs": {"num_classes": 5}},
    "num_classes": 5,
    "image_size": 12,
    "space": {"divisor": None, "min_ratio": 0.125},
    "subnet": '{"dropped": ["b"], "widths": {"a": 4}}',
    "data": "digits",
}
