"""The shape and the price of every node, from a run without arithmetic."""

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import count
from math import gcd
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import TraceError
from . import ops
from .attention import unfused_attention

#: Samples in the shape pass, at least: a prime that is no common layer width; see `_batch_beside`.
BATCH = 11


class _ShapePass(fx.Interpreter):
    """Records the shape and the MACs of every node, and with which of its operands it shares
    memory."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[str, ops.Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.counted: dict[str, int] = {}
        self.shared: dict[str, list[str]] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            value = super().run_node(n)
        own = _memory(value)
        self.shared[n.name] = [
            source.name for source in n.all_input_nodes if own & _memory(self.env[source])
        ]
        self.counted[n.name] = counter.get_total_flops() // 2
        self.shapes[n.name] = _shape(value)
        if isinstance(value, Tensor):
            self.dtypes[n.name] = value.dtype
        return value


def _shape(value: Any) -> ops.Shape:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, (tuple, list)):
        return [_shape(item) for item in value]
    return None


def _memory(value: Any) -> set[int]:
    """Which memory the tensors of a value lie in."""
    if isinstance(value, Tensor):
        strided = value.layout is torch.strided  # others have no storage of their own
        return {value.untyped_storage()._cdata if strided else id(value)}
    if isinstance(value, dict):
        return _memory(list(value.values()))
    if isinstance(value, (tuple, list)):
        return set().union(*map(_memory, value))
    return set()


def without_data(model: nn.Module) -> Any:
    """A copy in evaluation mode whose tensors have shapes alone."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, memo).to("meta").eval()


def _batch_beside(sizes: Collection[int]) -> int:
    """Samples that share no factor with any of these sizes. It keeps the batch dimension from
    being mistaken for another one when a reshape is taken apart."""
    return next(n for n in count(BATCH) if all(gcd(n, size) == 1 for size in sizes if size))


@dataclass(frozen=True)
class Shapes:
    """What a run without arithmetic tells of each node."""

    shapes: dict[fx.Node, ops.Shape]
    macs: dict[fx.Node, int]
    """Of all samples together."""
    dtypes: dict[fx.Node, torch.dtype]
    """Of those that are tensors."""
    shared: dict[fx.Node, list[fx.Node]]
    """The operands that the result shares memory with in evaluation: views, and what layers like
    dropout return as it is."""
    batch: int
    """The number of samples."""


def shapes_of(graph: fx.GraphModule, example: Tensor) -> Shapes:
    """Shapes, MACs and shared memory of the nodes."""
    sizes = {*example.shape[1:], *(n for p in graph.parameters() for n in p.shape)}
    batch = _batch_beside(sizes)
    run = _shape_pass(graph, example, batch)
    found = list(_flat(list(run.shapes.values())))
    # Next to the batch stands another multiple of it, such as 121 tokens: choose again.
    if any(sum(size % batch == 0 for size in shape) > 1 for shape in found):
        batch = _batch_beside(sizes.union(*found))
        run = _shape_pass(graph, example, batch)
    nodes = {node.name: node for node in graph.graph.nodes}
    return Shapes(
        {nodes[name]: shape for name, shape in run.shapes.items()},
        {nodes[name]: macs for name, macs in run.counted.items()},
        {nodes[name]: dtype for name, dtype in run.dtypes.items()},
        {nodes[name]: [nodes[other] for other in shared] for name, shared in run.shared.items()},
        batch,
    )


def macs_of(graph: fx.GraphModule, example: Tensor, batch: int) -> dict[str, int]:
    """MACs of each node, by name, of so many samples together."""
    return _shape_pass(graph, example, batch).counted


def _flat(shape: ops.Shape) -> Iterator[torch.Size]:
    """The shapes of all tensors among what a node yields."""
    if isinstance(shape, torch.Size):
        yield shape
    elif isinstance(shape, list):
        for item in shape:
            yield from _flat(item)


@torch.no_grad()
def _shape_pass(graph: fx.GraphModule, example: Tensor, batch: int) -> _ShapePass:
    """A run on images of the example's size, without arithmetic where the model allows it."""
    with unfused_attention():
        return _shape_run(graph, example, batch)


def _shape_run(graph: fx.GraphModule, example: Tensor, batch: int) -> _ShapePass:
    size = (batch, *example.shape[1:])
    try:  # shapes alone: no arithmetic
        run = _ShapePass(without_data(graph))
        run.run(torch.empty(size, dtype=example.dtype, device="meta"))
    except Exception:
        shadow = copy.deepcopy(graph).eval()
        run = _ShapePass(shadow)
        try:
            run.run(torch.zeros(size, dtype=example.dtype, device=example.device))
        except Exception as error:  # the user's model refuses its own example
            kinds = {p.dtype for p in graph.parameters() if p.is_floating_point()}
            wanted = "a model that fits the image size and channels of the data"
            if kinds and example.dtype not in kinds:
                wanted = f"an example of the parameters' type, {' or '.join(map(str, kinds))}"
            raise TraceError(
                f"the model fails on images {list(size)} of {example.dtype}: "
                f"{str(error).splitlines()[0]}; expected {wanted}"
            ) from error
    return run
