"""torch.fx's tracer, told what to keep whole and what control flow may ask of a shape."""

import inspect
import linecache
import operator
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ..errors import TraceError
from . import ops
from .shapes import BATCH, without_data

#: Where a node keeps the (file, line) that it comes from.
_LINE = "stp_line"
_OURS = tuple(os.path.dirname(path) + os.sep for path in (torch.__file__, __file__))

#: Marks a node whose value the model's control flow depends on.
DECIDES = "stp_decides"

#: What changes its first operand -> what does the same and returns a new tensor.
IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.ipow: operator.pow,
}


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is, a change of x itself; fx's own takes it for x = x + y. Where
    it stands for a tuple it has its length."""

    def __len__(self) -> int:
        count = cast("Tracer", self.tracer).count(self)
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
        return getattr(cast("Tracer", self.tracer).decide(self), name)()

    return decide


for _operation in IN_PLACE:
    setattr(_Proxy, f"__{_operation.__name__}__", _in_place(_operation))
for _name in ("__index__", "__int__", "__float__", "__ceil__", "__floor__", "__round__"):
    setattr(_Proxy, _name, _decided(_name))


class Tracer(fx.Tracer):
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
                "parameters that do not require gradients; a function that chooses its precision, "
                "or calls an autograd.Function, within which no gradients are recorded either, is "
                "kept whole under torch.fx.wrap"
            )
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
            if frame.f_code is recorded.__code__:  # no line of the model led here
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
            found = [self._evaluate(proxy.node, batch) for batch in (BATCH, 2)]
        except Exception:  # the value of a tensor, which has none here
            found = []
        if len(found) != 2 or found[0] != found[1] or not isinstance(found[0], (bool, int, float)):
            return super().to_bool(proxy)  # raises
        proxy.node.meta[DECIDES] = True
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
            found = self._evaluate(proxy.node, BATCH)
        except Exception:  # whatever the model's own code raises without values
            return None
        return len(found) if isinstance(found, (tuple, list)) else None

    def _evaluate(self, node: fx.Node, batch: int) -> Any:
        """The value of a node of the unfinished graph, computed without arithmetic."""
        if self._abstract is None:
            self._abstract = without_data(self.root)
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
        return kept_whole(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        self.path.append(self.path_of_module(m))
        out = super().call_module(m, forward, args, kwargs)
        self.path.pop()
        return out


def kept_whole(module: nn.Module) -> bool:
    """Whether a graph calls a module instead of what its forward calls."""
    return ops.module_rule(module) is not None or fx.Tracer().is_leaf_module(module, "")


def _surroundings() -> tuple[bool | int, ...]:
    """Whether gradients are recorded, where arithmetic is of lower precision, and in how many
    regions that say whether it is."""
    torch.autocast_increment_nesting()
    regions = torch.autocast_decrement_nesting()
    enabled = map(torch.is_autocast_enabled, ("cpu", "cuda"))
    return torch.is_grad_enabled(), *enabled, regions


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


def recorded(tracer: Tracer, model: nn.Module) -> fx.Graph:
    """The graph of a model as it is, or a `TraceError` that names the module and the line."""
    _require_images_alone(model)
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


def _require_images_alone(model: nn.Module) -> None:
    """Raise a `TraceError` where `forward` cannot be called with images and nothing else."""
    _, *inputs = inspect.signature(type(model).forward).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [
        each.name for each in inputs[1:] if each.default is each.empty and each.kind not in variable
    ]
    if needed:
        raise TraceError(
            f"the forward of {type(model).__name__} wants {', '.join(map(repr, needed))} besides "
            "the images; expected images alone; give the rest defaults, or wrap the model in one "
            "that passes them"
        )


def _is_ours(filename: str) -> bool:
    """Whether a line belongs to torch or to the tracer, and not to the user's model."""
    return filename.startswith(_OURS)


def line_of(node: fx.Node) -> str:
    """`name at file.py:line: code` of the line of the user's model."""
    name = str(node.target) if node.op == "call_module" else node.name
    if _LINE not in node.meta:
        return name
    file, line = node.meta[_LINE]
    return f"{name} at {os.path.basename(file)}:{line} `{linecache.getline(file, line).strip()}`"
