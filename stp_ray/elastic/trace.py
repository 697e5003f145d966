"""Model and example input -> graph, steps, axes and blocks, and what was frozen and why."""

import copy
import inspect
import linecache
import operator
import os
import random
import sys
import traceback
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import count
from math import ceil, gcd
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from ..errors import OptionError, TraceError
from . import ops
from .attention import unfused_attention
from .blocks import calls_layer, find_branches
from .cost import Extent, Term
from .dims import Dim, Dims, Frozen, Variable, length
from .flag import TRAINING, TrainingFlag
from .ops import Size, Step, Value, Visit
from .slicing import Layout, Merge
from .space import ResidualBlock, SearchSpace, WidthAxis

#: Samples in the shape pass, at least: a prime that is no common layer width; see `_batch_beside`.
_BATCH = 11

#: Where a node keeps the (file, line) that it comes from.
_LINE = "stp_line"
_OURS = tuple(os.path.dirname(path) + os.sep for path in (torch.__file__, __file__))

#: Marks a node whose module works in place in the model that was traced.
_WRITES = "stp_writes"

#: Marks a node whose value the model's control flow depends on.
_DECIDES = "stp_decides"

#: Under this key a graph names the layers that the model calls while it trains alone.
_TRAINING_ONLY = "stp_training_only"

_IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.ipow: operator.pow,
}

#: Operations whose result may share memory with their operand.
_VIEWS = frozenset(
    [
        "view", "reshape", "flatten", "unflatten", "transpose", "permute", "squeeze", "unsqueeze",
        "expand", "chunk", "split", "narrow", "select", "unbind", "detach", "contiguous", "getitem",
        "to", "float", "double", "type_as", "view_as", "expand_as", "Flatten", "Unflatten",
    ]
)  # fmt: skip


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
    shapes, counted, batch = _shapes(graph, example_input)
    _write_nothing(graph, shapes)
    analysis = _Analysis(graph, shapes, counted, batch)
    analysis.walk()
    analysis.keep_whole(ignore, only)
    return analysis.conclude(divisor, min_ratio)


# -- the graph --------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is, a change of x itself; fx's own takes it for x = x + y. Where
    it stands for a tuple it has its length."""

    def __len__(self) -> int:
        count = cast("_Tracer", self.tracer).count(self)
        return super().__len__() if count is None else count

    def __getattr__(self, k: str) -> "_Attribute":
        return _Attribute(self, k)


class _Attribute(fx.proxy.Attribute, _Proxy):
    """Something of a tensor, such as its shape, or a method that is about to be called."""


def _in_place(operation: Any) -> Any:
    def record(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return record


def _decided(name: str) -> Any:
    def decide(self: _Proxy) -> Any:
        return getattr(cast("_Tracer", self.tracer).decide(self), name)()

    return decide


for _operation in _IN_PLACE:
    setattr(_Proxy, f"__{_operation.__name__}__", _in_place(_operation))
for _name in ("__index__", "__int__", "__float__", "__ceil__", "__floor__", "__round__"):
    setattr(_Proxy, _name, _decided(_name))


class _Tracer(fx.Tracer):
    """Keeps layers that have a rule whole, remembers where tracing stopped, and notes the line
    of the user's model that each node comes from (fx's own record of stacks imports half of
    torch first)."""

    def __init__(self, example: Tensor, buffers: bool) -> None:
        super().__init__()
        # Read in every run, as parameters are, not once in the trace.
        self.proxy_buffer_attributes = buffers
        self.path: list[str] = []
        self._example = example
        self._abstract: nn.Module | None = None
        self._evaluating = False
        self._surroundings = _surroundings()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The images are the only input; every other argument of `forward` keeps its default."""
        names = list(inspect.signature(root_fn).parameters.values())[1:]
        named = names and names[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        images = self.create_proxy("placeholder", names[0].name if named else "x", (), {})
        return root_fn, [self.root, images]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self._surroundings:
            raise ValueError(
                "a graph cannot hold torch.no_grad() or torch.autocast(): detach tensors, or have "
                "parameters that do not require gradients"
            )
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
            if frame.f_code is _recorded.__code__:  # no line of the model led here
                return node
            frame = frame.f_back
        node.meta[_LINE] = (frame.f_code.co_filename, frame.f_lineno)
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.decide(obj))

    def decide(self, proxy: fx.Proxy) -> Any:
        """The value that control flow depends on, where the size of the images determines it:
        where it is a number that comes out the same for batches of different sizes."""
        if not _about_sizes(proxy.node):
            return super().to_bool(proxy)  # raises
        try:
            found = [self._evaluate(proxy.node, batch) for batch in (_BATCH, 2)]
        except Exception:  # the value of a tensor, which has none here
            found = []
        if len(found) != 2 or found[0] != found[1] or not isinstance(found[0], (bool, int, float)):
            return super().to_bool(proxy)  # raises
        proxy.node.meta[_DECIDES] = True
        return found[0]

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of a tuple of values, such as what a split gives, one by one."""
        count = self.count(obj)
        if count is None:
            return super().iter(obj)  # raises
        return iter([cast(Any, obj)[place] for place in range(count)])

    def count(self, proxy: fx.Proxy) -> int | None:
        """How many values a tuple of them has; None for what is no tuple, or cannot be computed
        without values of tensors."""
        try:
            found = self._evaluate(proxy.node, _BATCH)
        except Exception:  # whatever the model's own code raises without values
            return None
        return len(found) if isinstance(found, (tuple, list)) else None

    def _evaluate(self, node: fx.Node, batch: int) -> Any:
        """The value of a node of the unfinished graph, computed without arithmetic."""
        if self._abstract is None:
            self._abstract = _without_data(self.root)
        needed, stack = {node}, [node]
        while stack:
            new = set(stack.pop().all_input_nodes) - needed
            needed |= new
            stack += new
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for other in self.graph.nodes:
            if other in needed:
                copies[other] = graph.node_copy(other, copies.__getitem__)
        graph.output(copies[node])
        images = self._example.new_empty((batch, *self._example.shape[1:]), device="meta")
        self._evaluating = True
        try:
            with torch.no_grad():
                return fx.Interpreter(fx.GraphModule(self._abstract, graph)).run(images)
        finally:
            self._evaluating = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if ops.module_rule(m) is not None:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        self.path.append(self.path_of_module(m))
        out = super().call_module(m, forward, args, kwargs)
        self.path.pop()
        return out


def _surroundings() -> tuple[bool, ...]:
    """Whether gradients are recorded, and where arithmetic is of lower precision."""
    return torch.is_grad_enabled(), *map(torch.is_autocast_enabled, ("cpu", "cuda"))


def _luck() -> tuple[Any, ...]:
    """The states of the generators that a model may ask while it decides what to compute."""
    drawn = np.random.get_state(legacy=False)["state"]
    numpy_state = drawn["key"].tolist(), drawn["pos"]
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state


def _about_sizes(node: fx.Node) -> bool:
    """Whether a value is made of nothing but the shapes, ranks and types of tensors."""
    target: Any = node.target
    if target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype")
    if node.op == "call_method":
        return target in ("size", "dim", "ndimension", "numel")
    if node.op == "call_function" and target.__module__ in ("_operator", "math", "builtins"):
        return all(map(_about_sizes, node.all_input_nodes))
    return False


def symbolic_graph(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The model as a graph whose layers follow `train()` and `eval()`."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise TraceError(
                f"{name} of {type(model).__name__} has no shape yet; expected a model whose lazy "
                "layers have run: call it once on an example"
            )
    try:
        model = copy.deepcopy(model)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied: {str(error).splitlines()[0]}; expected a "
            "model that copy.deepcopy takes"
        ) from error
    was_training = model.training
    writing = [module for module in model.modules() if getattr(module, "inplace", False)]
    for module in writing:
        try:
            module.inplace = False  # type: ignore[assignment]
        except (AttributeError, RuntimeError) as error:  # a property, or TorchScript's
            raise TraceError(
                f"{type(module).__name__} does not let its `inplace` be set "
                f"({str(error).splitlines()[0]}); expected a plain attribute, and a model that is "
                "not compiled by torch.jit"
            ) from error
    known = set(vars(model))
    try:
        training, graph, constants = _both_modes(model, example, buffers=True)
    except TraceError as error:
        _forget(model, known)
        before = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
        try:  # control flow may depend on a buffer, such as a flag
            training, graph, constants = _both_modes(model, example, buffers=False)
        except TraceError:
            raise error from None
        for name, buffer in model.named_buffers():
            read, version = before[name]
            if buffer is not read or buffer._version != version:  # written by the trace
                raise error from None
    differing = {
        name for name, value in constants.items() if not _equal(value, getattr(model, name, None))
    }
    in_place = {name for name, module in model.named_modules() if module in writing}
    training_only = _follow_mode(training, graph, differing, in_place)
    if any(node.target == TRAINING for node in graph.nodes):
        model.add_module(TRAINING, TrainingFlag())
    graph._tracer_cls = None  # a pickled network is read with fx's own
    traced = fx.GraphModule(model, graph, class_name=type(model).__name__)
    traced.graph.lint()
    traced.meta[_TRAINING_ONLY] = training_only
    for node in traced.graph.nodes:
        if node.op == "call_module":
            module = traced.get_submodule(node.target)
            node.meta[_WRITES] = any(module is other for other in writing)
            # An identity on a shortcut would hide a residual branch.
            if type(module) is nn.Identity:
                node.replace_all_uses_with(node.all_input_nodes[0])
    return traced.train(was_training)


def _write_nothing(graph: fx.GraphModule, shapes: dict[fx.Node, ops.Shape]) -> None:
    """Make every operation return a new tensor. What reads the operand after an operation that
    worked in place now reads the result, so the network computes what it did."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for node in graph.graph.nodes:
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not _make_pure(node) or not isinstance(shapes.get(source), torch.Size):
            continue
        # Views made before it and read after it; what is made later is made from the result.
        views = [v for v in _aliases(source, graph) - {source} if order[v] < order[node]]
        if source.op == "get_attr" or any(
            order[user] > order[node] for view in views for user in view.users
        ):
            raise TraceError(
                f"{_source(node)} works in place on a tensor that other parts of the model share; "
                "expected an operation that returns a new tensor"
            )
        for user in list(source.users):
            if order[user] > order[node]:
                user.replace_input_with(source, node)
    # An unused second output would look like a way out; what decided something is looked at once.
    graph.graph.eliminate_dead_code(lambda node: node.is_impure() or _DECIDES in node.meta)
    graph.recompile()


def _make_pure(node: fx.Node) -> bool:
    """Replace an operation that works in place by one that does not; whether it did."""
    if node.op == "call_module":
        return bool(node.meta.get(_WRITES))
    if node.op not in ("call_function", "call_method"):
        return False
    target: Any = node.target
    if target in _IN_PLACE:
        node.target = _IN_PLACE[target]
        return True
    name = str(getattr(target, "__name__", target))
    if name.endswith("_") and not name.endswith("__") and getattr(operator, name, None) != target:
        homes = (torch.Tensor,) if node.op == "call_method" else (F, torch)
        pure = next((f for home in homes if callable(f := getattr(home, name[:-1], None))), None)
        if pure is None:
            raise TraceError(
                f"{_source(node)} works in place; expected an operation that returns a new tensor"
            )
        node.target = name[:-1] if node.op == "call_method" else pure
        return True
    place = _place_of("inplace", target)
    if node.kwargs.get("inplace") is True:
        node.update_kwarg("inplace", False)
    elif place is not None and len(node.args) > place and node.args[place] is True:
        node.update_arg(place, False)
    else:
        return False
    return True


#: What these return is new, and their backward passes do not look at it.
_FORGETFUL = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear)
_ADDITIONS = (operator.add, torch.add)


def _write_again(graph: fx.GraphModule, ends: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    """Let layers that worked in place do so again, where nobody else reads what they write over:
    it saves a tensor of that size, and the time to fill it.

    Args:
        graph: changed.
        ends: the addition that each block ends in -> the block.

    Returns the layers whose operand another layer still needs once a block is dropped, and the
    block.
    """
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.meta.get(_WRITES):
            calls.setdefault(graph.get_submodule(node.target), []).append(node)
    borrowing: dict[fx.Node, str] = {}
    for module, nodes in calls.items():
        sources = {node: node.args[0] for node in nodes if len(node.args) == 1}
        read = {n: s for n, s in sources.items() if isinstance(s, fx.Node)}
        if len(read) == len(nodes) and all(_is_its_own(s, graph) for s in read.values()):
            module.inplace = True  # type: ignore[assignment]
            borrowing |= {n: ends[s] for n, s in read.items() if s in ends}
    return borrowing


def _is_its_own(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Whether a value is a new tensor that is read once."""
    layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return len(node.users) == 1 and (isinstance(layer, _FORGETFUL) or node.target in _ADDITIONS)


def _place_of(argument: str, function: Any) -> int | None:
    try:
        return list(inspect.signature(function).parameters).index(argument)
    except (TypeError, ValueError):
        return None


def _aliases(node: fx.Node, graph: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose values may share memory with this one."""

    def is_view(other: fx.Node) -> bool:
        target: Any = other.target
        if other.op == "call_module":
            target = type(graph.get_submodule(str(target)))
        return getattr(target, "__name__", target) in _VIEWS

    found, stack = {node}, [node]
    while stack:
        here = stack.pop()
        near = {user for user in here.users if is_view(user) and user.args[:1] == (here,)}
        if is_view(here):
            near |= {source for source in here.args[:1] if isinstance(source, fx.Node)}
        stack += near - found
        found |= near
    return found


def _both_modes(
    model: nn.Module, example: Tensor, *, buffers: bool
) -> tuple[fx.Graph, fx.Graph, dict[str, Any]]:
    """The graphs of training and of evaluation, and the constants of the former; those of the
    latter are attributes of the model."""
    known = set(vars(model))
    training = _trace_once(model.train(), example, buffers)
    constants = {name: getattr(model, name) for name in set(vars(model)) - known}
    _forget(model, known)  # so that the second trace gives the same names
    return training, _trace_once(model.eval(), example, buffers), constants


def _forget(model: nn.Module, known: Collection[str]) -> None:
    """Take off what a trace has left on a model."""
    for name in set(vars(model)) - set(known):
        delattr(model, name)


def _trace_once(model: nn.Module, example: Tensor, buffers: bool) -> fx.Graph:
    luck, known = _luck(), set(vars(model))
    with torch.enable_grad():
        tracer = _Tracer(example, buffers)
        graph = _recorded(tracer, model)
    learnt = [
        name
        for name in set(vars(model)) - known
        if isinstance(value := getattr(model, name), Tensor) and value.requires_grad
    ]
    if learnt:
        reader = next(node for node in graph.nodes if node.target in learnt)
        raise TraceError(
            f"{_source(next(iter(reader.users), reader))} computes with a parameter that is not an "
            "attribute of its module; expected one that is; assign it to the module itself"
        )
    if _luck() != luck:
        raise TraceError(
            f"{type(model).__name__} draws random numbers while it decides what to compute, which "
            "a graph would hold on to; expected them in tensors alone; move the draw into a "
            "function under torch.fx.wrap that is told self.training"
        )
    return graph


def _recorded(tracer: _Tracer, model: nn.Module) -> fx.Graph:
    try:
        return tracer.trace(model)
    except Exception as error:  # the user's forward ran on proxies and may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not _is_ours(frame.filename)]
        where = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else "unknown line"
        code = f" `{own[-1].line}`" if own and own[-1].line else ""
        module = tracer.path[-1] if tracer.path else type(model).__name__
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TraceError(
            f"cannot trace {type(model).__name__}: module {module!r} at {where}{code}: {cause}; "
            "expected a forward whose control flow does not depend on the values of tensors; "
            "replace the operation, or give it a function of its own under torch.fx.wrap, which is "
            "kept whole"
        ) from error


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        abstract = one.is_meta or other.is_meta  # no values to compare
        return one.shape == other.shape if abstract else torch.equal(one, other)
    return bool(one == other)


def _follow_mode(
    training: fx.Graph, graph: fx.Graph, differing: set[str], in_place: set[str]
) -> list[str]:
    """Make the graph of evaluation mode follow `train()` too: where both traces do the same to the
    same, an argument that was a flag in one of them is read anew in every call.

    Args:
        training, graph: the traces; `graph` is changed.
        differing: constants whose values differ between the two.
        in_place: modules that work in place.

    Returns the names of layers that only training calls, such as auxiliary heads.
    """
    offered: dict[tuple[str, str], list[fx.Node]] = {}
    for other in training.nodes:
        offered.setdefault((other.op, str(other.target)), []).append(other)
    twins: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        same = offered.get((node.op, str(node.target)), [])
        if node.op == "get_attr" and node.target in differing:
            same = []
        twin = next((other for other in same if _agree(node, other, twins)), None)
        if twin is None:
            raise TraceError(
                f"the model computes different operations in training and evaluation mode, first "
                f"at {_source(node)}; expected one forward for both; move the difference into a "
                "function under torch.fx.wrap that is told self.training"
            )
        same.remove(twin)
        twins[node] = twin
    for node, twin in twins.items():
        if node.op != "output":
            node.args = _following(graph, node, node.args, twin.args)
            node.kwargs = _following(graph, node, node.kwargs, twin.kwargs)
    alone = set(training.nodes) - set(twins.values())
    for node in training.nodes:
        written = node.args[0] if node.args else None
        shared = isinstance(written, fx.Node) and (written not in alone or written.op == "get_attr")
        if node in alone and shared and _works_in_place(node, in_place):
            raise TraceError(
                f"{_source(node)} works in place while training alone; expected one forward for "
                "both modes; move the difference into a function under torch.fx.wrap that is told "
                "self.training"
            )
    return [str(n.target) for n in training.nodes if n in alone and n.op == "call_module"]


def _works_in_place(node: fx.Node, modules: set[str]) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return (
        node.target in _IN_PLACE
        or (node.op == "call_module" and node.target in modules)
        or (node.op != "call_module" and name.endswith("_") and not name.endswith("__"))
        or node.kwargs.get("inplace") is True
    )


def _agree(node: fx.Node, other: fx.Node, twins: dict[fx.Node, fx.Node]) -> bool:
    """Whether two nodes do the same to the same values, up to what the mode decides."""
    if node.op == "output":  # auxiliary outputs follow the logits
        theirs = other.args[0]
        parts = theirs
        if isinstance(theirs, fx.Node) and isinstance(theirs.target, type):  # a named tuple
            parts = (*theirs.args, *theirs.kwargs.values())
        first = parts[0] if isinstance(parts, (tuple, list)) and parts else parts
        return any(_same(node.args[0], value, twins) for value in (theirs, parts, first))
    return _same(node.args, other.args, twins) and _same(node.kwargs, other.kwargs, twins)


def _same(ours: Any, theirs: Any, twins: dict[fx.Node, fx.Node]) -> bool:
    if isinstance(ours, fx.Node):
        return twins.get(ours) is theirs
    if isinstance(ours, (tuple, list)):
        return (
            isinstance(theirs, (tuple, list))
            and len(ours) == len(theirs)
            and all(_same(a, b, twins) for a, b in zip(ours, theirs, strict=True))
        )
    if isinstance(ours, dict):
        return (
            isinstance(theirs, dict)
            and ours.keys() == theirs.keys()
            and all(_same(value, theirs[key], twins) for key, value in ours.items())
        )
    if isinstance(ours, slice) and isinstance(theirs, slice):
        parts = ("start", "stop", "step")
        return all(_same(getattr(ours, p), getattr(theirs, p), twins) for p in parts)
    return _is_flag(ours, theirs) or bool(ours == theirs)


def _is_flag(ours: Any, theirs: Any) -> bool:
    """`self.training`, or a rate that holds while it is true."""
    return (ours is False and theirs is True) or (
        type(ours) in (int, float) and ours == 0 and type(theirs) is float and theirs > 0
    )


def _following(graph: fx.Graph, node: fx.Node, ours: Any, theirs: Any) -> Any:
    if isinstance(ours, (tuple, list)):
        pairs = zip(ours, theirs, strict=True)
        return type(ours)(_following(graph, node, a, b) for a, b in pairs)
    if isinstance(ours, dict):
        return {key: _following(graph, node, ours[key], theirs[key]) for key in ours}
    if isinstance(ours, (fx.Node, slice)) or not _is_flag(ours, theirs):
        return ours
    with graph.inserting_before(node):
        flag = graph.call_module(TRAINING)
        return flag if theirs is True else graph.call_function(operator.mul, (flag, theirs))


def _is_ours(filename: str) -> bool:
    """Whether a line belongs to torch or to the tracer, and not to the user's model."""
    return filename.startswith(_OURS)


def _source(node: fx.Node) -> str:
    """`name at file.py:line: code` of the line of the user's model."""
    name = str(node.target) if node.op == "call_module" else node.name
    if _LINE not in node.meta:
        return name
    file, line = node.meta[_LINE]
    return f"{name} at {os.path.basename(file)}:{line} `{linecache.getline(file, line).strip()}`"


# -- shapes -----------------------------------------------------------------------------


class _ShapePass(fx.Interpreter):
    """Records the shape and the MACs of every node."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[str, ops.Shape] = {}
        self.counted: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            value = super().run_node(n)
        self.counted[n.name] = counter.get_total_flops() // 2
        self.shapes[n.name] = _shape(value)
        return value


def _shape(value: Any) -> ops.Shape:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, (tuple, list)):
        return [_shape(item) for item in value]
    return None


def _without_data(model: nn.Module) -> Any:
    """A copy in evaluation mode whose tensors have shapes alone."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, memo).to("meta").eval()


def _batch_beside(sizes: Collection[int]) -> int:
    """Samples that share no factor with any of these sizes. It keeps the batch dimension from
    being mistaken for another one when a reshape is taken apart."""
    return next(n for n in count(_BATCH) if all(gcd(n, size) == 1 for size in sizes if size))


def _shapes(
    graph: fx.GraphModule, example: Tensor
) -> tuple[dict[fx.Node, ops.Shape], dict[fx.Node, int], int]:
    """Shapes and MACs of the nodes, and the number of samples that they are for."""
    sizes = {*example.shape[1:], *(n for p in graph.parameters() for n in p.shape)}
    batch = _batch_beside(sizes)
    run = _shape_pass(graph, example, batch)
    found = list(_flat(list(run.shapes.values())))
    # Next to the batch stands another multiple of it, such as 121 tokens: choose again.
    if any(sum(size % batch == 0 for size in shape) > 1 for shape in found):
        batch = _batch_beside(sizes.union(*found))
        run = _shape_pass(graph, example, batch)
    nodes = {node.name: node for node in graph.graph.nodes}
    return (
        {nodes[name]: shape for name, shape in run.shapes.items()},
        {nodes[name]: macs for name, macs in run.counted.items()},
        batch,
    )


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
        run = _ShapePass(_without_data(graph))
        run.run(torch.empty(size, dtype=example.dtype, device="meta"))
    except Exception:
        shadow = copy.deepcopy(graph).eval()
        run = _ShapePass(shadow)
        try:
            run.run(torch.zeros(size, dtype=example.dtype, device=example.device))
        except Exception as error:  # the user's model refuses its own example
            raise TraceError(
                f"the model fails on images {list(size)}: {str(error).splitlines()[0]}; "
                "expected a model that fits the image size and channels of the data"
            ) from error
    return run


# -- the walk ---------------------------------------------------------------------------


class _Analysis:
    """Visits every node once, then turns what the rules found into a search space."""

    def __init__(
        self,
        graph: fx.GraphModule,
        shapes: dict[fx.Node, ops.Shape],
        counted: dict[fx.Node, int],
        batch: int,
    ) -> None:
        self.graph, self.shapes, self.counted, self.batch = graph, shapes, counted, batch
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
                for source in node.all_input_nodes:
                    for tensor in ops.tensors(self.values.get(source)):
                        self.dims.freeze(tensor, "network output", report=False)
            else:
                self.values[node] = self._visit(node, step)
        self._forget_decisions()

    def _forget_decisions(self) -> None:
        """What control flow depends on must not shrink; after that nobody needs it."""
        for node in self.graph.graph.nodes:
            if node.meta.pop(_DECIDES, False):
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
            step.macs = [(self.counted[node], ())]
        return value

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
            _source(node),
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
        borrowing = _write_again(
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
            for name in _outermost(self.graph.meta[_TRAINING_ONLY], self.graph.graph)
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
                    Frozen(layer, variable.size, f"no width below {variable.size} is admissible")
                    for layer in producers
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
                        f"the cost of {_source(node)} does not grow with the batch; expected an "
                        "operation that treats every sample alike"
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
