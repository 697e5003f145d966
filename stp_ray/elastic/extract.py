"""Supernet and subnet -> an ordinary module with weights of its own."""

import copy
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from .cost import Extent
from .slicing import Layout, Merge, arguments, measured, narrowed, sized
from .subnet import Subnet

if TYPE_CHECKING:
    from .supernet import Stats


@torch.no_grad()
def extract(
    model: fx.GraphModule,
    layouts: Mapping[str, Layout],
    merges: Mapping[str, Merge],
    subnet: Subnet,
    stats: "Stats | None",
) -> fx.GraphModule:
    """Copy the graph without the dropped blocks, and every layer cut to size.

    Layers keep their names, so the state dict has the names of the dense network.
    """
    graph = fx.Graph()
    root: dict[str, Any] = {}
    env: dict[str, fx.Node] = {}
    copies = _Copies()
    for node in model.graph.nodes:
        layout = layouts[node.name]
        if not layout.gates.isdisjoint(subnet.dropped):
            continue
        merge = merges.get(node.name)
        if merge is not None and merge.block in subnet.dropped:
            env[node.name] = env[cast(fx.Node, node.args[merge.shortcut]).name]
            continue
        env[node.name] = copied = graph.node_copy(node, lambda n: env[n.name])
        args, kwargs = arguments(node, layout)
        for key in layout.arguments:
            if isinstance(key, int):
                copied.update_arg(key, _rewritten(args[key], env, subnet))
            else:
                copied.update_kwarg(key, _rewritten(kwargs[key], env, subnet))
        target = str(node.target)
        if node.op == "call_module" and target in root and _another(root[target], layout, subnet):
            # a layer without weights that is called on another width, such as a norm
            target = copied.target = f"{target}_{node.name}"
        if node.op == "call_module" and target not in root:
            module = model.get_submodule(str(node.target))
            root[target] = _layer(str(node.target), module, layout, subnet, stats, copies)
        elif node.op == "call_module" and layout.borrows_without in subnet.dropped:
            root[target].inplace = False
        elif node.op == "get_attr":
            owner, _, leaf = target.rpartition(".")
            value = getattr(model.get_submodule(owner), leaf)
            if target in layout.tensors:
                value = copies.own(value, layout.cut(target, value, subnet))
            root[target] = value
    small = fx.GraphModule(root, graph, class_name=model.__class__.__name__)
    return small.train(model.training)


def _another(made: nn.Module, layout: Layout, subnet: Subnet) -> bool:
    """Whether a layer that was made for one call does not have the sizes of another one."""
    if layout.tensors:  # they have one size for all calls
        return False
    sizes = {name: sized(value, subnet) for name, value in layout.attributes.items()}
    return any(attrgetter(name)(made) != value for name, value in sizes.items())


def _layer(
    name: str,
    module: nn.Module,
    layout: Layout,
    subnet: Subnet,
    stats: "Stats | None",
    copies: "_Copies",
) -> nn.Module:
    tensors: dict[str, Tensor | None] = {}
    cut = False
    for tensor_name in layout.tensors:
        owner, _, leaf = tensor_name.rpartition(".")
        tensor = getattr(module.get_submodule(owner), leaf)
        part = layout.cut(tensor_name, tensor, subnet)
        cut = cut or part is not tensor
        tensors[tensor_name] = copies.own(tensor, part)
    mean = tensors.get("running_mean")
    if layout.norm and stats is not None and mean is not None:
        found = measured(name, stats, mean)
        tensors.update({key: value.clone() for key, value in found.items()})
    sizes = layout.sizes(subnet) if cut or not layout.tensors else {}
    small = narrowed(module, tensors, sizes, layout.narrow_class if cut else None)
    return deep_copy(small, (tensor for tensor in tensors.values() if tensor is not None))


def deep_copy(module: nn.Module, kept: Iterable[Tensor] = ()) -> nn.Module:
    """A copy of a module; `kept` are tensors that it shares with it."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in kept}
    for inner in module.modules():  # such as the weights that spectral_norm's hook has computed
        computed = [v for v in vars(inner).values() if isinstance(v, Tensor) and not v.is_leaf]
        memo |= {id(value): value.detach().clone() for value in computed}
    return copy.deepcopy(module, memo)


class _Copies:
    """One copy of each tensor, so that weights that were tied stay tied."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}

    def own(self, original: Tensor, part: Tensor) -> Tensor:
        """A contiguous copy of `part` that is a parameter where the original was one."""
        if id(original) not in self._made:
            copied = part.detach().clone(memory_format=torch.contiguous_format)
            if isinstance(original, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=original.requires_grad)
            self._made[id(original)] = copied
        return self._made[id(original)]


def _rewritten(value: Any, env: Mapping[str, fx.Node], subnet: Subnet) -> Any:
    if isinstance(value, Extent):
        return value.at(subnet.widths)
    if isinstance(value, fx.Node):
        return env[value.name]
    if isinstance(value, (tuple, list)):
        return type(value)(_rewritten(item, env, subnet) for item in value)
    return value
