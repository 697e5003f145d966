"""The user's model as a torch.fx graph whose layers follow `train()` and `eval()`."""

import copy
import operator
import random
from collections.abc import Collection
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from ..errors import TraceError
from . import ops
from .flag import TRAINING, TrainingFlag
from .in_place import WRITES, works_in_place
from .tracer import Tracer, kept_whole, line_of, recorded

#: Under this key a graph names the layers that the model calls while it trains alone.
TRAINING_ONLY = "stp_training_only"


def symbolic_graph(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The model as a graph whose layers follow `train()` and `eval()`."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise TraceError(
                f"{name} of {type(model).__name__} has no shape yet; expected a model whose lazy "
                "layers have run: call it once on an example"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise TraceError(
                f"{name or type(model).__name__} is a SyncBatchNorm, which waits for its like on "
                "all workers, and their subnets differ; expected nn.BatchNorm2d; leave out "
                "convert_sync_batchnorm"
            )
    _require_no_gradient_hooks(model)
    try:
        model = copy.deepcopy(model)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied: {str(error).splitlines()[0]}; expected a "
            "model that copy.deepcopy takes"
        ) from error
    _part(model)
    if "forward" in vars(model) or model._forward_hooks or model._forward_pre_hooks:
        raise TraceError(
            f"{type(model).__name__} has forward hooks, or a forward of its own that is not its "
            "class's, which a graph would leave out; expected neither on the outermost module; "
            "give it to a module whose forward calls it, and trace that one"
        )
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
    _require_same_modes(model, traced)
    _require_unread_statistics(traced.graph)
    traced.meta[TRAINING_ONLY] = training_only
    for node in traced.graph.nodes:
        if node.op == "call_module":
            module = traced.get_submodule(node.target)
            node.meta[WRITES] = any(module is other for other in writing)
            # An identity on a shortcut would hide a residual branch.
            if type(module) is nn.Identity and ops.module_rule(module) is not None:
                node.replace_all_uses_with(node.all_input_nodes[0])
    return traced.train(was_training)


#: Buffers that a norm writes while it trains.
_WRITTEN = ("running_mean", "running_var", "num_batches_tracked")


def _part(model: nn.Module) -> None:
    """Give each tensor memory of its own: of what is expanded, or a view of another one, elements
    would be put in order never or twice. Raises TraceError where a norm writes what is shared."""
    first: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout is not torch.strided:
            continue
        other = first.setdefault(tensor.untyped_storage()._cdata, name)
        if other != name and any(each.endswith(_WRITTEN) for each in (name, other)):
            raise TraceError(
                f"{name} and {other} share memory that is written in training; expected tensors "
                "of their own; read the one that is written in forward, or have a copy of it"
            )
        if 0 in tensor.stride() or other != name:
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def _require_no_gradient_hooks(model: nn.Module) -> None:
    """Raise TraceError where gradients would pass by a hook: a copy of a parameter has none, nor
    has a graph those of a module that it does not call."""
    hooked = [
        name
        for name, p in model.named_parameters()
        if p._backward_hooks or p._post_accumulate_grad_hooks
    ]
    hooked += [
        name or type(model).__name__
        for name, module in model.named_modules()
        if (module._backward_hooks or module._backward_pre_hooks) and not kept_whole(module)
    ]
    if hooked:
        raise TraceError(
            f"{hooked[0]} has hooks that see gradients, which would not run in a graph; expected "
            "none on parameters, and on modules only on torch's own layers; take them off before "
            "the trace"
        )


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


def _require_unread_statistics(graph: fx.Graph) -> None:
    """Raise TraceError where a forward reads what a norm that it calls has measured: each subnet is
    measured anew, and what comes after the read with it."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for node in graph.nodes:
        owner, _, leaf = str(node.target).rpartition(".")
        if node.op == "get_attr" and owner in called and leaf in _WRITTEN:
            reader = next(iter(node.users), node)
            raise TraceError(
                f"{line_of(reader)} reads {node.target}, which every subnet measures anew; "
                f"expected statistics that {owner} alone reads; keep what is read in a buffer"
            )


def _require_same_modes(model: nn.Module, traced: fx.GraphModule) -> None:
    """Raise TraceError where a `train()` of the model's own sets modes that the graph, which has
    not got it, would not: for norms whose statistics stay, or dropout that does."""
    for mode in (True, False):
        model.train(mode)
        modes = {id(module): module.training for module in model.modules()}
        traced.train(mode)
        for name, module in traced.named_modules():
            differs = modes.get(id(module), module.training) != module.training
            if differs and _has_modes(module):
                raise TraceError(
                    f"{name} is in {'evaluation' if mode else 'training'} mode where "
                    f"{type(model).__name__} is not, because of a train() of the model's own that "
                    "a graph would leave out; expected all layers to follow it; give the layer a "
                    "train() of its own that holds it, or use torchvision.ops.FrozenBatchNorm2d"
                )


def _has_modes(module: nn.Module) -> bool:
    """Whether a layer itself asks whether it trains."""
    return any(
        "training" in member.__code__.co_names
        for kind in type(module).__mro__
        if kind is not nn.Module
        for member in vars(kind).values()
        if isinstance(member, FunctionType)
    )


def _forget(model: nn.Module, known: Collection[str]) -> None:
    """Take off what a trace has left on a model."""
    for name in set(vars(model)) - set(known):
        delattr(model, name)


def _luck() -> tuple[Any, ...]:
    """The states of the generators that a model may ask while it decides what to compute."""
    drawn = np.random.get_state(legacy=False)["state"]
    numpy_state = drawn["key"].tolist(), drawn["pos"]
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state


def _trace_once(model: nn.Module, example: Tensor, buffers: bool) -> fx.Graph:
    luck, known = _luck(), set(vars(model))
    with torch.enable_grad():
        tracer = Tracer(example, buffers)
        graph = recorded(tracer, model)
    learnt = [
        name
        for name in set(vars(model)) - known
        if isinstance(value := getattr(model, name), Tensor) and value.requires_grad
    ]
    if learnt:
        reader = next(node for node in graph.nodes if node.target in learnt)
        raise TraceError(
            f"{line_of(next(iter(reader.users), reader))} computes with a parameter that is not an "
            "attribute of its module; expected one that is; assign it to the module itself"
        )
    if _luck() != luck:
        raise TraceError(
            f"{type(model).__name__} draws random numbers while it decides what to compute, which "
            "a graph would hold on to; expected them in tensors alone; move the draw into a "
            "function under torch.fx.wrap that is told self.training"
        )
    return graph


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
                f"at {line_of(node)}; expected one forward for both; move the difference into a "
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
        if node in alone and shared and works_in_place(node, in_place):
            raise TraceError(
                f"{line_of(node)} works in place while training alone; expected one forward for "
                "both modes; move the difference into a function under torch.fx.wrap that is told "
                "self.training"
            )
    return [str(n.target) for n in training.nodes if n in alone and n.op == "call_module"]


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
