"""A finished network that has a say in the labels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import require


class Teacher:
    """Labels that a finished network has a say in: (1 - weight) * y + weight * softmax(z) [ours].

    But for a constant, the cross-entropy with such a label is (1 - weight) * CE with y plus
    weight * KL from the teacher.

    Args:
        network: images [B, C, H, W] -> logits [B, classes]; it is put into eval mode, not trained.
        weight: the teacher's part, in (0, 1].

    Raises:
        ValueError: the weight is out of range.
    """

    def __init__(self, network: nn.Module, weight: float = 0.5) -> None:
        require(0 < weight <= 1, "weight", weight, "in (0, 1]", "0.5 is usual")
        self.network = network.eval().requires_grad_(False)
        self.weight = weight

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Soft labels [B, classes], of at least single precision, for images [B, C, H, W] with
        labels [B] or [B, classes]."""
        said = self.network(images).float().softmax(dim=1)
        if not labels.is_floating_point():
            labels = F.one_hot(labels, said.shape[1])
        return torch.lerp(labels.to(said.dtype), said, self.weight)
