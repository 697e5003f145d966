"""Subnet -> which prefix of which tensor. The one plan behind running, extracting and pricing."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .cost import Extent
from .subnet import Subnet

# A leaf and its gradient are parts of larger tensors, with the same gaps between their rows;
# PyTorch tells that gradients without gaps might be faster.
warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout", UserWarning)

#: Per atom of a dimension: start, full length, axis (None: constant), elements per unit.
Segments = tuple[tuple[int, int, str | None, int], ...]
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """What one node of the graph needs to run sliced.

    Args:
        tensors: parameter or buffer -> segments per dimension, None for one that is never cut.
        attributes: attribute of the module (dotted) -> value, with `Extent` for sizes.
        arguments: position or keyword of the call -> value, with `Extent` for sizes; in a list of
            sizes None stands for what the model wrote.
        narrow_class: the class of the narrowed module where it differs.
        norm: whether the module keeps running statistics.
        scratch: buffers that the module may write while it trains; a subnet gets copies.
        gates: blocks whose dropping removes the node.
        borrows_without: of a module that works in place, the block without which its operand is
            another node's result, which it must leave as it is.
    """

    tensors: Mapping[str, tuple[Segments | None, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[int | str, Any] = field(default_factory=dict)
    narrow_class: type[nn.Module] | None = None
    norm: bool = False
    scratch: tuple[str, ...] = ()
    gates: frozenset[str] = frozenset()
    borrows_without: str | None = None

    def sizes(self, subnet: Subnet) -> dict[str, Any]:
        """The attributes of the narrowed module."""
        found = {name: sized(value, subnet) for name, value in self.attributes.items()}
        if self.borrows_without in subnet.dropped:
            found["inplace"] = False
        return found

    def cut(self, name: str, tensor: Tensor, subnet: Subnet) -> Tensor:
        """The kept part of a parameter or buffer: the tensor itself where nothing is cut, a view
        where every dimension keeps one prefix, else gathered parts."""
        return _kept(tensor, self.ranges(name, subnet))

    def leaf(self, name: str, parameter: nn.Parameter, subnet: Subnet) -> Tensor:
        """The kept part of a parameter as a leaf of its own: a backward pass adds its gradient to
        the matching part of `parameter.grad`, instead of to zeros of the full size first."""
        cuts = self.ranges(name, subnet) if name in self.tensors else {}
        leaf = _kept(parameter.detach(), cuts)
        if leaf.ndim > 2 and cuts.keys() - {0}:
            leaf = leaf.clone()  # convolutions copy such a kernel themselves, in each direction
        if not parameter.requires_grad:
            return leaf
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = parameter.grad
        leaf.requires_grad_()
        if all(len(ranges) == 1 for ranges in cuts.values()):
            leaf.grad = _kept(grad, cuts)
        else:
            leaf.register_post_accumulate_grad_hook(lambda leaf: _add(leaf, grad, cuts))
        return leaf

    def ranges(self, name: str, subnet: Subnet) -> dict[int, Ranges]:
        """The kept ranges of every dimension that is cut."""
        cuts = {}
        for dim, segments in enumerate(self.tensors[name]):
            if segments is not None:
                kept = _ranges(segments, subnet.widths)
                if kept != ((0, segments[-1][0] + segments[-1][1]),):
                    cuts[dim] = kept
        return cuts


@dataclass(frozen=True)
class Merge:
    """An addition that yields its `shortcut`-th operand alone when `block` is dropped."""

    block: str
    shortcut: int


def arguments(node: fx.Node, layout: Layout) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with elastic sizes in place of those that the model wrote."""
    if not layout.arguments:
        return node.args, node.kwargs
    args, kwargs = list(node.args), dict(node.kwargs)
    for key, value in layout.arguments.items():
        if isinstance(key, int):
            args[key] = _completed(value, args[key])
        else:
            kwargs[key] = _completed(value, kwargs.get(key))
    return tuple(args), kwargs


def _completed(value: Any, written: Any) -> Any:
    """The value of a layout's argument, with what the model wrote where a list leaves that."""
    if not isinstance(value, list):
        return value
    return [old if new is None else new for new, old in zip(value, written, strict=True)]


def _kept(tensor: Tensor, cuts: Mapping[int, Ranges]) -> Tensor:
    for dim, ranges in cuts.items():
        parts = [tensor.narrow(dim, start, stop - start) for start, stop in ranges]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return tensor


def _add(leaf: Tensor, grad: Tensor, cuts: Mapping[int, Ranges]) -> None:
    """Move the gradient of a kept part to where the part was taken from."""
    assert leaf.grad is not None
    _scatter(leaf.grad, grad, tuple(cuts.items()))
    leaf.grad = None


def _scatter(kept: Tensor, whole: Tensor, cuts: tuple[tuple[int, Ranges], ...]) -> None:
    if not cuts:
        whole += kept
        return
    (dim, ranges), *others = cuts
    if len(ranges) == 1:
        ((start, stop),) = ranges
        _scatter(kept, whole.narrow(dim, start, stop - start), tuple(others))
        return
    done = 0
    for start, stop in ranges:
        part, length = whole.narrow(dim, start, stop - start), stop - start
        _scatter(kept.narrow(dim, done, length), part, tuple(others))
        done += length


def _ranges(segments: Segments, widths: Mapping[str, int]) -> Ranges:
    kept: list[tuple[int, int]] = []
    for start, length, axis, factor in segments:
        stop = start + (length if axis is None else widths[axis] * factor)
        if kept and kept[-1][1] == start:
            kept[-1] = (kept[-1][0], stop)
        elif stop > start:
            kept.append((start, stop))
    return tuple(kept)


def sized(value: Any, subnet: Subnet) -> Any:
    """`value` with every `Extent` in it turned into an integer."""
    if isinstance(value, Extent):
        return value.at(subnet.widths)
    if isinstance(value, (tuple, list)):
        return type(value)(sized(item, subnet) for item in value)
    return value


def measured(
    layer: str, stats: Mapping[str, Mapping[str, Tensor]], mean: Tensor
) -> Mapping[str, Tensor]:
    """What was measured for a layer that keeps running statistics, with as many channels as
    `mean`. Raises ValueError where that is nothing, or was measured for another width."""
    found = stats.get(layer)
    if found is None or found["running_mean"].shape != mean.shape:
        held = "none" if found is None else f"those of {len(found['running_mean'])} channels"
        raise ValueError(
            f"statistics of {layer} are {held}; expected those of {len(mean)} channels; calibrate "
            "this subnet and give what comes out as it is"
        )
    return found


def narrowed(
    module: nn.Module,
    tensors: Mapping[str, Tensor | None],
    attributes: Mapping[str, Any],
    kind: type[nn.Module] | None = None,
) -> nn.Module:
    """A layer like `module` with other tensors and sizes; `module` itself stays as it is.

    What is not named is shared with `module`, so that a slice costs no copy.
    """
    shell = _shell(module, kind)
    for name, value in {**attributes, **tensors}.items():
        *path, leaf = name.split(".")
        owner, whole = shell, module
        for part in path:
            child, whole = owner.get_submodule(part), whole.get_submodule(part)
            if child is whole:
                child = owner._modules[part] = _shell(child)
            owner = child
        if leaf in owner._parameters:
            owner._parameters[leaf] = value
        elif leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            owner.__dict__[leaf] = value
    return shell


def _shell(module: nn.Module, kind: type[nn.Module] | None = None) -> nn.Module:
    shell = object.__new__(kind or type(module))
    shell.__dict__.update(module.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):
        shell.__dict__[registry] = copy.copy(module.__dict__[registry])
    return shell
