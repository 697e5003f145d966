"""Operations that work in place: what a graph does without, and what layers may do again."""

import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..errors import TraceError
from .shapes import Shapes
from .tracer import DECIDES, IN_PLACE, line_of

#: Marks a node whose module works in place in the model that was traced.
WRITES = "stp_writes"


def write_nothing(graph: fx.GraphModule, found: Shapes) -> None:
    """Make every operation return a new tensor. What reads the operand after an operation that
    worked in place now reads the result, so the network computes what it did."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    shared = dict(found.shared)
    for node in graph.graph.nodes:
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not _make_pure(node) or not isinstance(found.shapes.get(source), torch.Size):
            continue
        # Views made before it and read after it; what is made later is made from the result.
        views = [v for v in _aliases(source, shared) - {source} if order[v] < order[node]]
        if source.op == "get_attr" or any(
            order[user] > order[node] for view in views for user in view.users
        ):
            raise TraceError(
                f"{line_of(node)} works in place on a tensor that other parts of the model share; "
                "expected an operation that returns a new tensor"
            )
        result = _in_its_type(node, source, found)
        order[result] = order[node]
        for user in list(source.users):
            if order[user] > order[node]:
                user.replace_input_with(source, result)
                shared[user] = [result if s is source else s for s in shared.get(user, ())]
    # An unused second output would look like a way out; what decided something is looked at once.
    graph.graph.eliminate_dead_code(lambda node: node.is_impure() or DECIDES in node.meta)
    graph.recompile()


def _in_its_type(node: fx.Node, source: fx.Node, found: Shapes) -> fx.Node:
    """The result in the type of the operand that was written over, whatever that is in a run, where
    another operand widens it."""
    kind = found.dtypes[source]
    others = (found.dtypes.get(other, kind) for other in node.all_input_nodes)
    if all(torch.promote_types(kind, other) == kind for other in others):
        return node
    with node.graph.inserting_after(node):
        cast = node.graph.call_method("type_as", (node, source))
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    cast.meta.update(node.meta)
    found.shapes[cast], found.macs[cast], found.dtypes[cast] = found.shapes[node], 0, kind
    return cast


def _make_pure(node: fx.Node) -> bool:
    """Replace an operation that works in place by one that does not; whether it did."""
    if node.op == "call_module":
        return bool(node.meta.get(WRITES))
    if node.op not in ("call_function", "call_method"):
        return False
    target: Any = node.target
    if target in IN_PLACE:
        node.target = IN_PLACE[target]
        return True
    name = str(getattr(target, "__name__", target))
    if name.endswith("_") and not name.endswith("__") and getattr(operator, name, None) != target:
        homes = (torch.Tensor,) if node.op == "call_method" else (F, torch)
        pure = next((f for home in homes if callable(f := getattr(home, name[:-1], None))), None)
        if pure is None:
            raise TraceError(
                f"{line_of(node)} works in place; expected an operation that returns a new tensor"
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


def write_again(graph: fx.GraphModule, ends: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
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
        if node.meta.get(WRITES):
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


def _aliases(node: fx.Node, shared: Mapping[fx.Node, list[fx.Node]]) -> set[fx.Node]:
    """Nodes whose values share memory with this one."""
    found, stack = {node}, [node]
    while stack:
        here = stack.pop()
        near = {user for user in here.users if here in shared.get(user, ())}
        near |= set(shared.get(here, ()))
        stack += near - found
        found |= near
    return found


def works_in_place(node: fx.Node, modules: set[str]) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return (
        node.target in IN_PLACE
        or (node.op == "call_module" and node.target in modules)
        or (node.op != "call_module" and name.endswith("_") and not name.endswith("__"))
        or node.kwargs.get("inplace") is True
    )
