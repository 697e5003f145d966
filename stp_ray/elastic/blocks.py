"""Residual branches that can be dropped, found from the graph.

A branch hangs between a shortcut value and an addition: the shortcut dominates it (nothing
else enters) and the addition is its only way out (nothing else leaves). Shape and dimensions
of both operands agree, so leaving the branch out leaves a well-formed network.
"""

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import fx, nn

from .flag import TRAINING
from .ops import tensors_in

_ADDITIONS = (operator.add, operator.iadd, torch.add)


@dataclass(frozen=True)
class Branch:
    """`addition` = `shortcut` + what `nodes` compute from it."""

    addition: fx.Node
    shortcut: fx.Node
    nodes: frozenset[fx.Node]


def find_branches(graph: fx.GraphModule, shapes: Mapping[fx.Node, Any]) -> dict[str, Branch]:
    """Droppable branches by name, in the order of the graph."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    shared = _shared_targets(graph)
    found = []
    for node in graph.graph.nodes:
        adds = node.op == "call_function" and node.target in _ADDITIONS
        if not (adds or (node.op == "call_method" and node.target == "add")):
            continue
        if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
            continue
        one, other = node.args
        if one is other or not shapes[one] == shapes[other] == shapes[node]:
            continue
        for shortcut, end in ((other, one), (one, other)):
            inner = _between(shortcut, end, order, shapes)
            if inner is None or not any(map(calls_layer, inner)):
                continue
            leaves = any(user not in inner and user is not node for n in inner for user in n.users)
            if not leaves and not any(n.target in shared for n in inner):
                found.append(Branch(node, shortcut, frozenset(inner)))
                break
    return _named(found)


def calls_layer(node: fx.Node) -> bool:
    """Whether a node is a layer of the model."""
    return node.op == "call_module" and node.target != TRAINING


def _between(
    shortcut: fx.Node, end: fx.Node, order: dict[fx.Node, int], shapes: Mapping[fx.Node, Any]
) -> set[fx.Node] | None:
    """Everything that `end` needs beyond `shortcut`; None if anything else enters but numbers,
    such as the height and width of the images."""
    inner: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node is shortcut or node in inner:
            continue
        source = not node.all_input_nodes
        before = order[node] < order[shortcut] and not source
        if before and not tensors_in(shapes[node]):
            continue
        if node.op == "placeholder" or before:
            return None
        if source and any(order[user] < order[shortcut] for user in node.users):
            continue  # a parameter that others use too stays outside
        inner.add(node)
        stack += node.all_input_nodes
    return {n for n in inner if n.all_input_nodes or all(u in inner for u in n.users)}


def _shared_targets(graph: fx.GraphModule) -> set[Any]:
    """Layers that are called more than once or have weights in common with others: a block that
    holds one of them cannot be dropped alone."""
    uses = Counter[int]()
    weights: dict[str, set[int]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            parameters = graph.get_submodule(str(node.target)).parameters()
            weights[str(node.target)] = {id(parameter) for parameter in parameters}
            uses.update(weights[str(node.target)])
        elif node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            value = getattr(graph.get_submodule(owner), leaf)
            if isinstance(value, nn.Parameter):  # a buffer is read, whoever else reads it
                weights[str(node.target)] = {id(value)}
                uses.update(weights[str(node.target)])
    return {target for target, own in weights.items() if any(uses[weight] > 1 for weight in own)}


def _named(branches: list[Branch]) -> dict[str, Branch]:
    """A branch is named after the module that holds it; where several share one (attention and
    MLP of a transformer layer), after its own largest child."""
    homes = [_home(branch) for branch in branches]
    clashes = Counter(homes)
    named: dict[str, Branch] = {}
    for home, branch in zip(homes, branches, strict=True):
        name = home if home and clashes[home] == 1 else _child(home, branch)
        while name in named:
            name += "+"
        named[name] = branch
    return named


def _layers(branch: Branch) -> list[str]:
    return sorted(str(node.target) for node in branch.nodes if calls_layer(node))


def _home(branch: Branch) -> str:
    paths = [layer.split(".") for layer in _layers(branch)]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    common = [parts[0] for parts in shared]
    return ".".join(common if len(paths) > 1 else common[:-1])


def _child(home: str, branch: Branch) -> str:
    """The child of `home` with the most layers in the branch, the last one of several."""
    skip = len(home) + 1 if home else 0
    children = [
        str(node.target)[skip:].split(".")[0]
        for node in sorted(branch.nodes, key=lambda n: n.name)
        if calls_layer(node)
    ]
    counts = Counter(children)
    weighed = {child: (_weight(branch, home, child), counts[child]) for child in counts}
    best = max(weighed, key=lambda child: (weighed[child], child))
    return f"{home}.{best}" if home else best


def _weight(branch: Branch, home: str, child: str) -> int:
    """Parameters of the child's layers."""
    prefix = f"{home}.{child}" if home else child
    total = 0
    for node in branch.nodes:
        target = str(node.target)
        if node.op == "call_module" and (target == prefix or target.startswith(prefix + ".")):
            owner = node.graph.owning_module
            assert owner is not None
            total += sum(p.numel() for p in owner.get_submodule(target).parameters())
    return total
