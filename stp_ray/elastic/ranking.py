"""Which units of an axis matter, and their order: a slice keeps a prefix, so the best come first.

Permuting the units of an axis in every tensor that it runs through leaves the network's output as
it is. That is how trained weights become a supernet whose narrow subnets are worth something
[ours; importance scores from the literature as noted].
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from .slicing import Segments

if TYPE_CHECKING:
    from .supernet import Supernet

Importance = Literal["l1", "l2", "norm", "taylor"]


def importance(net: "Supernet", kind: Importance = "l2") -> dict[str, Tensor]:
    """A score for each unit of each axis, the higher the more it matters.

    Args:
        net: the supernet; its main network is looked at.
        kind: "l1" or "l2", the sum of the absolute or squared weights that a unit owns (Li et
            al., ICLR 2017; over coupled layers as in DepGraph, CVPR 2023); "norm", the scale of the
            normalisation that follows (Liu et al., ICCV 2017), by l2 on axes without one;
            "taylor", the sum of |weight * gradient| (Molchanov et al., CVPR 2019), for which
            gradients have to be there; a weight without one, such as a frozen one, counts nothing.

    Returns:
        axis -> [size], on the device of the weights.

    Raises:
        ValueError: `kind` is unknown, or is "taylor" and no weight has a gradient.
    """
    if kind not in ("l1", "l2", "norm", "taylor"):
        raise ValueError(f"importance {kind!r}: expected l1, l2, norm or taylor")
    if kind == "taylor" and all(tensor.grad is None for _, tensor, _ in _parameters(net)):
        raise ValueError(
            "there is no gradient on any weight; importance by Taylor expansion needs "
            "loss.backward() first"
        )
    totals: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, tensor, is_scale in _parameters(net):
        for dim, segments in _cut_dims(net, name):
            others = [place for place in range(tensor.dim()) if place != dim]
            for key, elements in _per_unit(_saliency(tensor, kind), others, dim, segments):
                totals[key] = totals.get(key, 0) + elements
            if is_scale:
                for key, elements in _per_unit(tensor.detach().abs(), others, dim, segments):
                    scales[key] = scales.get(key, 0) + elements
    if kind == "norm":
        return {name: scales.get(name, total) for name, total in totals.items()}
    return totals


@torch.no_grad()
def rank(net: "Supernet", scores: Mapping[str, Tensor]) -> None:
    """Permute the units of each axis, the highest score first; the main network computes what it
    did.

    Args:
        net: its weights change places, in place; an optimiser's state would not follow.
        scores: axis -> [size]; axes that are not named keep their order.

    Raises:
        ValueError: an axis is unknown, or a score has another length than its axis.
    """
    sizes = {axis.name: axis.size for axis in net.space.axes}
    for name, score in scores.items():
        if score.dim() != 1 or sizes.get(name) != len(score):
            raise ValueError(
                f"scores of axis {name!r} have the shape {list(score.shape)}; expected "
                f"{[sizes[name]] if name in sizes else 'the name of an axis of this space'}"
            )
    orders = {name: score.argsort(descending=True, stable=True) for name, score in scores.items()}
    for name, tensor in _tensors(net):
        for dim, segments in _cut_dims(net, name):
            if any(axis in orders for _, _, axis, _ in segments):
                index = torch.cat([_places(segment, orders, tensor.device) for segment in segments])
                tensor.copy_(tensor.index_select(dim, index))


def _places(
    segment: tuple[int, int, str | None, int], orders: Mapping[str, Tensor], device: torch.device
) -> Tensor:
    """Where the elements of a segment come from."""
    start, length, axis, factor = segment
    if axis not in orders:
        return torch.arange(start, start + length, device=device)
    units = orders[cast(str, axis)].to(device)
    return (start + units[:, None] * factor + torch.arange(factor, device=device)).flatten()


def _saliency(tensor: Tensor, kind: Importance) -> Tensor:
    weight = tensor.detach()
    if kind == "l1":
        return weight.abs()
    if kind != "taylor":
        return weight.square()
    return torch.zeros_like(weight) if tensor.grad is None else (weight * tensor.grad).abs()


def _per_unit(
    values: Tensor, others: list[int], dim: int, segments: Segments
) -> Iterator[tuple[str, Tensor]]:
    """(axis, [size]): values summed over all dimensions but one, and over a unit's elements."""
    elements = values.sum(others) if others else values
    for start, length, axis, factor in segments:
        if axis is not None:
            yield axis, elements[start : start + length].view(-1, factor).sum(1)


def _cut_dims(net: "Supernet", name: str) -> Iterator[tuple[int, Segments]]:
    for dim, segments in enumerate(net.segments[name]):
        if segments is not None:
            yield dim, segments


def _tensors(net: "Supernet") -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer with an elastic dimension, tied ones once."""
    for name in net.segments:
        owner, _, leaf = name.rpartition(".")
        yield name, getattr(net.model.get_submodule(owner), leaf)


def _parameters(net: "Supernet") -> Iterator[tuple[str, Tensor, bool]]:
    """The parameters among them, and whether each is the scale of a normalisation."""
    for name, tensor in _tensors(net):
        if isinstance(tensor, nn.Parameter):
            owner, _, leaf = name.rpartition(".")
            layer = type(net.model.get_submodule(owner)).__name__
            yield name, tensor, leaf == "weight" and "Norm" in layer
