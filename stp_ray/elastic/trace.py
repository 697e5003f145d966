"""Model and example input -> graph, steps, axes and blocks, and what was frozen and why."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import ceil, gcd
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import OptionError, TraceError
from . import ops
from .blocks import calls_layer, find_branches
from .cost import Extent, Term
from .dims import Dim, Dims, Frozen, Variable, length
from .graph import TRAINING_ONLY, symbolic_graph
from .in_place import write_again, write_nothing
from .ops import Size, Step, Value, Visit
from .shapes import Shapes, macs_of, shapes_of
from .slicing import Layout, Merge
from .space import ResidualBlock, SearchSpace, WidthAxis
from .tracer import DECIDES, line_of


@dataclass(frozen=True)
class Traced:
    """A dense model understood as a space of subnets.

    Args:
        model: the dense network as a graph; its parameters have the original names.
        layouts: what each node needs to run sliced.
        merges: what to do where a droppable block ends.
        space: axes, blocks and prices.
        frozen: what could not be made elastic.
    """

    model: fx.GraphModule
    layouts: dict[str, Layout]
    merges: dict[str, Merge]
    space: SearchSpace
    frozen: tuple[Frozen, ...]


def trace(
    model: nn.Module,
    example_input: Tensor,
    *,
    divisor: int | None = None,
    min_ratio: float = 0.125,
    ignore: Sequence[str] = (),
    only: Sequence[str] = (),
) -> Traced:
    """Discover the elastic structure of a classifier.

    Args:
        model: any module that maps images to logits; it is copied, never changed.
        example_input: images [B, C, H, W]; the spatial size is fixed by it, B is not.
        divisor: widths are multiples of it; by default 8, or 1 for networks with no layer of
            128 channels or more.
        min_ratio: smallest width of an axis as a share of its full width.
        ignore: patterns of modules that stay whole, such as "layer4" or "*.conv1".
        only: patterns of modules outside of which everything stays whole; empty for all.

    Raises:
        TraceError: the model cannot be traced; the message names the operation and the line.
        OptionError: an option is out of range, or a pattern matches no layer.
    """
    if isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
        model = original  # what torch.compile has wrapped
    if not isinstance(model, nn.Module):
        raise TraceError(f"the model is a {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            "the model is a ScriptModule, whose code cannot be traced; expected the "
            "torch.nn.Module that it was made from"
        )
    if not isinstance(example_input, Tensor) or example_input.dim() != 4:
        tensor = isinstance(example_input, Tensor)
        found = f"has shape {list(example_input.shape)}" if tensor else f"is {example_input!r:.40}"
        raise TraceError(f"the example input {found}; expected images [B, C, H, W] in a tensor")
    if divisor is not None and not (isinstance(divisor, int) and divisor >= 1):
        raise OptionError(f"divisor is {divisor!r}; expected a positive integer")
    if not (isinstance(min_ratio, int | float) and 0 < min_ratio <= 1):
        raise OptionError(f"min_ratio is {min_ratio!r}; expected a share in (0, 1]")
    for name, patterns in (("ignore", ignore), ("only", only)):
        if isinstance(patterns, str):
            raise OptionError(f"{name} is {patterns!r}; expected a list: [{patterns!r}]")
        if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
            raise OptionError(f"{name} is {patterns!r:.60}; expected a list of patterns of names")
    graph = symbolic_graph(model, example_input)
    shapes = shapes_of(graph, example_input)
    write_nothing(graph, shapes)
    analysis = _Analysis(graph, shapes, example_input)
    analysis.walk()
    analysis.keep_whole(ignore, only)
    return analysis.conclude(divisor, min_ratio)


class _Analysis:
    """Visits every node once, then turns what the rules found into a search space."""

    def __init__(self, graph: fx.GraphModule, found: Shapes, example: Tensor) -> None:
        self.graph, self.batch, self._example = graph, found.batch, example
        self.shapes, self.counted = found.shapes, found.macs
        self.dims = Dims()
        self.steps: dict[fx.Node, Step] = {}
        self.values: dict[fx.Node, Value] = {}
        self._tensor_dims: dict[int, tuple[Dim, ...]] = {}
        self._whole: set[str] = set()

    def walk(self) -> None:
        for node in self.graph.graph.nodes:
            step = self.steps[node] = Step()
            if node.op == "placeholder":
                self.values[node] = ops.constants(self.shapes[node])
            elif node.op == "get_attr":
                tensor = _attribute(self.graph, str(node.target))
                if isinstance(tensor, Tensor):
                    self.values[node] = self._declare(str(node.target))
                    step.tensors[str(node.target)] = self.values[node]
            elif node.op == "output":
                if not node.all_input_nodes:
                    raise TraceError(
                        f"the model returns {node.args[0]!r:.40} whatever the images are; expected "
                        "logits"
                    )
                for place, source in enumerate(node.all_input_nodes):  # first the logits
                    for tensor in ops.tensors(self.values.get(source)):
                        reason = "the model returns more than its logits"
                        self.dims.freeze(tensor, reason, report=place > 0)
            else:
                self.values[node] = self._visit(node, step)
        self._forget_decisions()

    def _forget_decisions(self) -> None:
        """What control flow depends on must not shrink; after that nobody needs it."""
        for node in self.graph.graph.nodes:
            if node.meta.pop(DECIDES, False):
                visit = self._look(node, self.steps[node])
                visit.freeze(tuple(visit.origins(node)), reason="decides what the model computes")
        self.graph.graph.eliminate_dead_code()
        self.graph.recompile()
        self.steps = {node: self.steps[node] for node in self.graph.graph.nodes}

    def _visit(self, node: fx.Node, step: Step) -> Value:
        visit = self._look(node, step)
        rule = ops.rule_for(node, visit.maybe_module) or ops.unknown
        try:
            value = rule(visit)
            self._freeze_sizes(visit)
            understood = _fits(value, self.shapes[node])
        except (ValueError, IndexError, TypeError, KeyError):  # a way to call it that no rule knows
            understood = False
        if not understood:
            visit.step = self.steps[node] = step = Step()
            value = ops.unknown(visit)
        if step.opaque:
            step.macs = [(self._counted(node), ())]
        return value

    def _counted(self, node: fx.Node) -> int:
        """What torch counts for a batch; a layer that computes its weights of others, which it
        does once a batch, does so for each image here, as for one that comes alone."""
        counted = self.counted[node]
        if node.op == "call_module" and counted:
            two = self._counted_for_two[node.name]
            each, rest = divmod(counted - two, self.batch - 2)
            if each > 0 and rest == 0 and (shared := two - 2 * each) > 0:
                return self.batch * (each + shared)
        return counted

    @cached_property
    def _counted_for_two(self) -> dict[str, int]:
        return macs_of(self.graph, self._example, 2)

    def _freeze_sizes(self, visit: Visit) -> None:
        """What an operation on tensors takes as a number, and no rule rewrites, stays as it is."""
        node = visit.node
        if not ops.tensors_in(self.shapes[node]):
            return
        for key, argument in (*enumerate(node.args), *node.kwargs.items()):
            if key not in visit.step.arguments:
                fx.node.map_arg(
                    argument,
                    lambda other: visit.freeze(
                        tuple(visit.origins(other)), reason="computes with the size of a dimension"
                    ),
                )

    def _look(self, node: fx.Node, step: Step) -> Visit:
        module = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        return Visit(
            node, module, step, self.dims, self.values, self.shapes, self.batch, self._declare,
            line_of(node),
        )  # fmt: skip

    def _declare(self, name: str) -> tuple[Dim, ...]:
        """Dimensions of a parameter or buffer; one that is used twice has them once."""
        tensor = _attribute(self.graph, name)
        if id(tensor) not in self._tensor_dims:
            self._tensor_dims[id(tensor)] = tuple(self.dims.fresh(n) for n in tensor.shape)
        return self._tensor_dims[id(tensor)]

    def keep_whole(self, ignore: Sequence[str], only: Sequence[str]) -> None:
        """Freeze every dimension of the layers that the user wants whole; their blocks stay too."""
        homes = {
            node: {name: self._full_name(node, name).rpartition(".")[0] for name in step.tensors}
            for node, step in self.steps.items()
        }
        layers = sorted({layer for names in homes.values() for layer in names.values()})
        for pattern in (*ignore, *only):
            if not any(_matches(layer, pattern) for layer in layers):
                such = (
                    f"such as {layers[-1]!r}, or one that holds layers"
                    if layers
                    else "with weights"
                )
                raise OptionError(f"pattern {pattern!r} matches no layer; expected a module {such}")
        for layer in layers:
            inside = not only or any(_matches(layer, pattern) for pattern in only)
            if not inside or any(_matches(layer, pattern) for pattern in ignore):
                self._whole.add(layer)
        for node, names in homes.items():
            for name, layer in names.items():
                if layer in self._whole:
                    self.dims.freeze(self.steps[node].tensors[name], "kept whole as asked")

    def _full_name(self, node: fx.Node, tensor: str) -> str:
        return tensor if node.op == "get_attr" else f"{node.target}.{tensor}"

    def _variables(self) -> dict[Variable, int]:
        """The free variables that some layer produces, and the least factor that each has."""
        found: dict[Variable, int] = {}
        for step in self.steps.values():
            for dims in step.tensors.values():
                for dim in dims:
                    for atom in self.dims.resolve(dim):
                        if atom.variable is not None and atom.variable.producers:
                            least = found.get(atom.variable, atom.factor)
                            found[atom.variable] = min(least, atom.factor)
        return found

    def conclude(self, divisor: int | None, min_ratio: float) -> Traced:
        branches = {
            name: branch
            for name, branch in find_branches(self.graph, self.shapes).items()
            if not any(
                self._full_name(node, tensor).rpartition(".")[0] in self._whole
                for node in branch.nodes
                for tensor in self.steps[node].tensors
            )
        }
        gates: dict[fx.Node, frozenset[str]] = {
            node: frozenset(name for name, branch in branches.items() if node in branch.nodes)
            for node in self.graph.graph.nodes
        }
        axes = self._axes(divisor, min_ratio)
        borrowing = write_again(
            self.graph, {branch.addition: name for name, branch in branches.items()}
        )
        layouts = {
            node.name: Layout(
                tensors={
                    name: tuple(_segments(self.dims.resolve(dim), axes) for dim in dims)
                    for name, dims in step.tensors.items()
                },
                attributes={k: self._sized(v, axes) for k, v in step.attributes.items()},
                arguments={k: self._sized(v, axes) for k, v in step.arguments.items()},
                narrow_class=step.narrow_class,
                norm=step.norm,
                scratch=step.scratch,
                gates=gates[node],
                borrows_without=borrowing.get(node),
            )
            for node, step in self.steps.items()
        }
        macs, params = self._terms(axes, gates)
        homes = self._homes(axes, gates)
        blocks = [
            ResidualBlock(
                name=name,
                axes=tuple(sorted(a for a, home in homes.items() if name in home)),
                layers=tuple(
                    dict.fromkeys(
                        str(node.target)
                        for node in self.steps
                        if node in branch.nodes and calls_layer(node)
                    )
                ),
                within=tuple(sorted(gates[branch.addition] - {name})),
            )
            for name, branch in branches.items()
        ]
        space = SearchSpace([axis for _, axis in axes.values()], blocks, macs, params)
        merges = {
            branch.addition.name: Merge(name, branch.addition.args.index(branch.shortcut))
            for name, branch in branches.items()
        }
        left_out = [
            Frozen(name, 0, "only training calls it; left out")
            for name in _outermost(self.graph.meta[TRAINING_ONLY], self.graph.graph)
        ]
        return Traced(self.graph, layouts, merges, space, (*self.dims.frozen, *left_out))

    def _axes(self, divisor: int | None, min_ratio: float) -> dict[Variable, tuple[str, WidthAxis]]:
        """The free variables that some layer produces, as axes."""
        found = self._variables()
        if divisor is None:
            widest = max((v.size * factor for v, factor in found.items()), default=0)
            divisor = 8 if widest >= 128 else 1
        axes: dict[Variable, tuple[str, WidthAxis]] = {}
        taken: Counter[str] = Counter()
        for variable, factor in found.items():
            producers = self.dims.producers(variable)
            name = producers[0]
            taken[name] += 1
            if taken[name] > 1:
                name = f"{name}#{taken[name]}"
            step_size = 1 if variable.unit == "heads" else divisor // gcd(divisor, factor)
            floor = max(step_size, ceil(variable.size * min_ratio / step_size - 1e-9) * step_size)
            choices = tuple(dict.fromkeys([*range(floor, variable.size, step_size), variable.size]))
            if len(choices) < 2:
                self.dims.frozen += [
                    Frozen(layer, size, f"no width below {size} is admissible")
                    for layer in producers
                    for size in (self.dims.size_of(layer),)
                ]
                continue
            axis = WidthAxis(name, variable.size, choices, variable.unit, tuple(producers))
            axes[variable] = (name, axis)
        return axes

    def _sized(self, value: Any, axes: dict[Variable, tuple[str, WidthAxis]]) -> Any:
        if isinstance(value, Size):
            extent = _extent(self.dims.resolve(value.dim), axes)
            return Extent(
                extent.constant // value.per,
                tuple((axis, factor // value.per) for axis, factor in extent.parts),
            )
        if isinstance(value, (tuple, list)):
            return type(value)(self._sized(item, axes) for item in value)
        return value

    def _terms(
        self, axes: dict[Variable, tuple[str, WidthAxis]], gates: dict[fx.Node, frozenset[str]]
    ) -> tuple[list[Term], list[Term]]:
        macs, params = [], []
        counted: set[int] = set()
        by_images, by_sizes = self._fed(tensors=True), self._fed(tensors=False)
        for node, step in self.steps.items():
            for coefficient, dims in step.macs:
                per_sample, rest = divmod(coefficient, self.batch)
                if node not in by_images and (rest or node not in by_sizes):
                    # Parameters alone determine it: it is computed once for all samples.
                    per_sample = coefficient
                elif rest:
                    raise TraceError(
                        f"the cost of {line_of(node)} does not grow as the batch does; expected an "
                        "operation that treats every sample alike; take out of it what it computes "
                        "once for all of them"
                    )
                extents = tuple(_extent(self.dims.resolve(dim), axes) for dim in dims)
                macs.append(Term(per_sample, extents, gates[node]))
            for name, dims in step.tensors.items():
                tensor = _attribute(self.graph, self._full_name(node, name))
                if isinstance(tensor, nn.Parameter) and id(tensor) not in counted:
                    counted.add(id(tensor))
                    extents = tuple(_extent(self.dims.resolve(dim), axes) for dim in dims)
                    params.append(Term(1, extents, gates[node]))
        return macs, params

    def _fed(self, *, tensors: bool) -> set[fx.Node]:
        """Nodes whose value depends on the images: through tensors, or also through sizes."""
        found: set[fx.Node] = set()
        for node in self.graph.graph.nodes:
            sources = found.intersection(node.all_input_nodes)
            if tensors:
                sources = {s for s in sources if ops.tensors_in(self.shapes[s])}
            if node.op == "placeholder" or sources:
                found.add(node)
        return found

    def _homes(
        self, axes: dict[Variable, tuple[str, WidthAxis]], gates: dict[fx.Node, frozenset[str]]
    ) -> dict[str, frozenset[str]]:
        """For each axis the blocks that hold every tensor it touches."""
        homes: dict[str, frozenset[str]] = {}
        for node, step in self.steps.items():
            for dims in step.tensors.values():
                for dim in dims:
                    for atom in self.dims.resolve(dim):
                        if atom.variable in axes:
                            name = axes[atom.variable][0]
                            homes[name] = homes.get(name, gates[node]) & gates[node]
        return homes


def _fits(value: Value, shape: ops.Shape) -> bool:
    """Whether the lengths that a rule found are those that the shape pass saw."""
    if isinstance(shape, torch.Size):
        return isinstance(value, tuple) and tuple(map(length, value)) == tuple(shape)
    if isinstance(shape, list) and isinstance(value, list):
        return len(shape) == len(value) and all(map(_fits, value, shape))
    return value is None or not ops.tensors_in(shape)


def _matches(layer: str, pattern: str) -> bool:
    """Whether a pattern names a layer or a module that holds it."""
    return fnmatchcase(layer, pattern) or fnmatchcase(layer, f"{pattern}.*")


def _outermost(layers: Iterable[str], graph: fx.Graph) -> list[str]:
    """The modules that hold these layers and none that the graph calls."""
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    found: dict[str, None] = {}
    for layer in layers:
        parts = layer.split(".")
        names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        free = (n for n in names if not any(f"{c}.".startswith(f"{n}.") for c in called))
        if outermost := next(free, None):
            found[outermost] = None
    return list(found)


def _attribute(root: nn.Module, name: str) -> Any:
    found: Any = root
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _extent(dim: Dim, axes: dict[Variable, tuple[str, WidthAxis]]) -> Extent:
    total, parts = 0, Counter[str]()
    for atom in dim:
        if atom.variable in axes:
            parts[axes[atom.variable][0]] += atom.factor
        else:
            total += atom.length
    return Extent(total, tuple(sorted(parts.items())))


def _segments(
    dim: Dim, axes: dict[Variable, tuple[str, WidthAxis]]
) -> tuple[tuple[int, int, str | None, int], ...] | None:
    """(start, length, axis or None, factor) per atom; None for a dimension never cut."""

    def walk() -> Iterator[tuple[int, int, str | None, int]]:
        start = 0
        for atom in dim:
            name = axes[atom.variable][0] if atom.variable in axes else None
            yield start, atom.length, name, atom.factor
            start += atom.length

    segments = tuple(walk())
    return segments if any(axis for _, _, axis, _ in segments) else None
