"""What a rule sees of one node of a traced graph, and where it writes what it finds."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..dims import Dim, Dims, Frozen, constant, length

#: What a node yields: the dimensions of a tensor, a tuple of such, or None for anything else.
Value = Any
Shape = Any


@dataclass(frozen=True)
class Size:
    """Stands for the length of `dim`, counted in units of `per` elements."""

    dim: Dim
    per: int = 1


@dataclass
class Step:
    """What tracing found out about one node.

    Args:
        tensors: parameter or buffer (relative to the module, or the attribute's own name) ->
            its dimensions.
        attributes: attribute of the module (dotted) -> its value, with `Size` inside.
        arguments: position or keyword of the call -> its value, with `Size` inside.
        macs: (coefficient, dimensions) per sample.
        narrow_class: the class that a narrowed module takes, where it is not its own.
        norm: whether the module keeps running statistics of its batches.
        scratch: buffers that a module without a rule may write while it trains.
        opaque: whether only PyTorch's counter knows what it costs.
    """

    tensors: dict[str, tuple[Dim, ...]] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    arguments: dict[int | str, Any] = field(default_factory=dict)
    macs: list[tuple[int, tuple[Dim, ...]]] = field(default_factory=list)
    narrow_class: type[nn.Module] | None = None
    norm: bool = False
    scratch: tuple[str, ...] = ()
    opaque: bool = False


#: What a tensor tells that no width changes.
_NO_SIZE = frozenset(["dim", "ndimension", "ndim", "dtype", "device", "get_device"])


class Visit:
    """One node, as a rule sees it.

    Args:
        node: the node.
        step: where the rule writes what it finds.
        dims: the equations.
        values: dimensions of the nodes visited before.
        shapes: full shapes of all nodes for a batch of `batch` samples.
        tensors: returns the dimensions of a parameter or buffer by its full name.
        source: where in the user's code the operation stands.
    """

    def __init__(
        self,
        node: fx.Node,
        module: nn.Module | None,
        step: Step,
        dims: Dims,
        values: Mapping[fx.Node, Value],
        shapes: Mapping[fx.Node, Shape],
        batch: int,
        tensors: Callable[[str], tuple[Dim, ...]],
        source: str,
    ) -> None:
        self.node, self.step, self.dims, self.batch, self.source = node, step, dims, batch, source
        self.maybe_module = module
        self.shape = shapes[node]
        self._values, self._shapes, self._tensors = values, shapes, tensors

    @property
    def module(self) -> Any:
        return self.maybe_module

    @property
    def layer(self) -> str:
        return str(self.node.target) if self.node.op == "call_module" else self.node.name

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of the call by position (the receiver of a method is 0) or keyword."""
        if len(self.node.args) > position:
            return self.node.args[position]
        names = (name, "axis") if name == "dim" else (name,)
        return next((self.node.kwargs[n] for n in names if n in self.node.kwargs), default)

    @property
    def x(self) -> Value:
        """The dimensions of the first input."""
        kwargs = self.node.kwargs
        return self.value(self.node.args[0] if self.node.args else kwargs.get("input"))

    def parts(self) -> list[Value]:
        """The dimensions of each of several tensors given as one argument."""
        given = self.argument(0, "tensors")
        if isinstance(given, fx.Node):
            return list(self.value(given))
        return [self.value(part) for part in given]

    def key(self, position: int, name: str) -> int | str:
        """How `Step.arguments` names that argument."""
        return position if len(self.node.args) > position else name

    def value(self, node: Any) -> Value:
        """The dimensions of an input node; None if it is not a tensor."""
        return self._values.get(node) if isinstance(node, fx.Node) else None

    def shape_of(self, node: fx.Node) -> Shape:
        return self._shapes[node]

    def origins(self, value: Any) -> list[Dim]:
        """The elastic dimensions whose lengths an integer was computed from."""
        if not isinstance(value, fx.Node) or tensors_in(self._shapes[value]):
            return []
        told = value.args[1] if value.target is getattr else value.target
        if told in _NO_SIZE:
            return []
        source, places = value, list[Any]()
        while source.target is operator.getitem and isinstance(source.args[0], fx.Node):
            places.insert(0, source.args[1])
            source = source.args[0]
        if source.op == "call_method" and source.target == "size":
            place = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim")
            places[:0] = [] if place is None else [place]
        found: list[Dim] = []
        for node in source.all_input_nodes:
            dims = self._values.get(node)
            found += _taken(dims, places) if isinstance(dims, tuple) else self.origins(node)
        return [dim for dim in found if not self.dims.is_constant(dim)]

    def resolved(self, dims: Iterable[Dim]) -> tuple[Dim, ...]:
        return tuple(self.dims.resolve(dim) for dim in dims)

    def tensor(self, name: str, *dims: Dim | None) -> tuple[Dim, ...]:
        """Declare a parameter or buffer of the module; given dimensions are unified with its
        own, None leaves one as it is. Absent tensors (a missing bias) are passed over."""
        found = self.module
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            return ()
        own = self._tensors(f"{self.node.target}.{name}")
        for dim, given in zip(own, dims, strict=False):
            if given is not None:
                self.unify(dim, given)
        self.step.tensors[name] = own
        return own

    def unify(self, one: Dim, other: Dim) -> Dim:
        return self.dims.unify(one, other, f"widths that do not match meet: {self.source}")

    def freeze(self, *values: Value, reason: str = "") -> None:
        for value in values:
            for tensor in tensors(value):
                self.dims.freeze(tensor, f"{reason or 'no rule for this operation'}: {self.source}")

    def macs(self, coefficient: int, *dims: Dim) -> None:
        """Add `coefficient * product of dims` multiply-accumulates for the whole batch."""
        self.step.macs.append((coefficient, dims))

    def constants(self) -> Value:
        """The node's output with nothing elastic in it."""
        return constants(self.shape)


def tensors(value: Value) -> Iterable[tuple[Dim, ...]]:
    if value is None:
        return
    if isinstance(value, list):
        for item in value:
            yield from tensors(item)
    else:
        yield value


def constants(shape: Shape) -> Value:
    """Values are tuples for tensors, lists for several, None for anything else."""
    if isinstance(shape, torch.Size):
        return tuple(constant(n) for n in shape)
    if isinstance(shape, list):
        return [constants(item) for item in shape]
    return None


def tensors_in(shape: Shape) -> bool:
    """Whether a node yields a tensor, alone or among others."""
    return isinstance(shape, torch.Size) or (
        isinstance(shape, list) and any(tensors_in(item) for item in shape)
    )


def _taken(dims: tuple[Dim, ...], places: Iterable[Any]) -> tuple[Dim, ...]:
    """What of a shape is left after it has been indexed, such as the third of [1:][2]; all of it
    where that is not known."""
    for place in places:
        if isinstance(place, int):
            return (dims[place],)
        if not isinstance(place, slice) or any(
            isinstance(part, fx.Node) for part in (place.start, place.stop, place.step)
        ):
            return dims
        dims = dims[place]
    return dims


def spread(dims: Sequence[Dim]) -> tuple[int, tuple[Dim, ...]]:
    """The product of several dimensions as (constant factor, elastic dimensions)."""
    factor, elastic = 1, []
    for dim in dims:
        if any(atom.variable is not None for atom in dim):
            elastic.append(dim)
        else:
            factor *= length(dim)
    return factor, tuple(elastic)


Rule = Callable[[Visit], Value]


def unknown(visit: Visit) -> Value:
    """Freeze everything that reaches the operation, and say so."""
    visit.step.opaque = True
    inputs, before = visit.node.all_input_nodes, len(visit.dims.frozen)
    name = type(visit.module).__name__ if visit.maybe_module is not None else visit.node.target
    name = getattr(name, "__name__", name)
    visit.freeze(*(visit.value(node) for node in inputs), reason=f"no rule for {name}")
    for node in inputs:
        visit.freeze(tuple(visit.origins(node)), reason=f"no rule for {name}, which uses the size")
    if visit.maybe_module is not None:
        parameters = [tensor for tensor, _ in visit.module.named_parameters()]
        if parameters and len(visit.dims.frozen) == before:  # it stands in nobody's way but its own
            shape = visit.shape if isinstance(visit.shape, torch.Size) else (0,)
            width = shape[1] if len(shape) == 4 else shape[-1]
            reason = f"no rule for {name}: {visit.source}"
            visit.dims.frozen.append(Frozen(visit.layer, width, reason))
        for tensor in parameters:
            visit.dims.freeze(visit.tensor(tensor), f"no rule for {name}", report=False)
        kind, buffers = type(visit.module), dict(visit.module.named_buffers())
        own_forward = "forward" in vars(visit.module)
        if kind.forward is nn.modules.batchnorm._BatchNorm.forward and not own_forward:
            # one with hooks, say: its statistics are a subnet's own all the same
            for tensor in ("running_mean", "running_var"):
                visit.dims.freeze(visit.tensor(tensor), f"no rule for {name}", report=False)
            visit.step.norm = True
            for tensor in ("running_mean", "running_var", "num_batches_tracked"):
                buffers.pop(tensor, None)
        visit.step.scratch = tuple(buffers)
    return visit.constants()
