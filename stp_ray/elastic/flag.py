"""`self.training` as a layer: a graph that is saved and loaded reads an attribute as a constant."""

from torch import nn

#: What the layer is called in a graph.
TRAINING = "training_flag"


class TrainingFlag(nn.Module):
    """Says whether it is in training mode."""

    def forward(self) -> bool:
        """The flag, which `train()` and `eval()` set here as everywhere."""
        return self.training
