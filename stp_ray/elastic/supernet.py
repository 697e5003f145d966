"""A dense classifier and, in the same weights, every subnet of its search space."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from torch import Tensor, fx, nn

from .cost import Cost, Extent
from .dims import Frozen
from .extract import extract
from .ranking import rank
from .show import folded, table
from .slicing import Layout, Merge, Ranges, Segments, arguments, measured, narrowed
from .space import SearchSpace
from .subnet import Subnet
from .trace import Traced, trace

#: BatchNorm layer -> {"running_mean": [C], "running_var": [C]} of one subnet.
Stats = Mapping[str, Mapping[str, Tensor]]
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class StatsRecorder:
    """Collects the BatchNorm statistics of one subnet over several batches.

    Pass it as `stats` to the forward of a supernet; every layer then normalises with the batch
    and its mean and variance are averaged over all batches seen [ST].
    """

    def __init__(self) -> None:
        self._buffers: dict[str, dict[str, Tensor]] = {}

    def buffers(self, layer: str, like: Tensor, count: Tensor) -> dict[str, Tensor]:
        """The running buffers of a layer; `like` [C] gives their size, type and device, the scalar
        `count` those of the number of batches."""
        if layer not in self._buffers:
            self._buffers[layer] = {
                "running_mean": like.new_zeros(like.shape),
                "running_var": like.new_ones(like.shape),
                "num_batches_tracked": count.new_zeros(()),
            }
        return self._buffers[layer]

    def stats(self) -> Stats:
        """What was collected, by layer; empty for a network without BatchNorm."""
        return {
            layer: {name: buffers[name].clone() for name in ("running_mean", "running_var")}
            for layer, buffers in self._buffers.items()
        }


class Supernet(nn.Module):
    """A traced classifier that runs as its main network or as any subnet of it.

    A subnet is an argument of `forward`, never a state of the module. `state_dict()` of
    `model` has the names of the network that was traced (of a layer that has two, the first),
    without what its forward does not use and with all that `rank` puts in another order: load
    trained weights into the network before it is traced.

    Attributes:
        model: the main network.
        space: the search space.
        frozen: layers that could not be made elastic, each with its reason.
    """

    model: fx.GraphModule

    def __init__(self, traced: Traced) -> None:
        super().__init__()
        self.model = traced.model
        self.space: SearchSpace = traced.space
        self.frozen: tuple[Frozen, ...] = traced.frozen
        self._layouts: Mapping[str, Layout] = traced.layouts
        self._merges: Mapping[str, Merge] = traced.merges
        self._last_uses = _last_uses(self.model.graph)
        for name in self.segments:  # a state dict has to tell what `rank` puts in another order
            owner, _, leaf = name.rpartition(".")
            self.model.get_submodule(owner)._non_persistent_buffers_set.discard(leaf)
        self.train(self.model.training)

    @classmethod
    def trace(
        cls,
        model: nn.Module,
        example_input: Tensor,
        *,
        divisor: int | None = None,
        min_ratio: float = 0.125,
        ignore: Sequence[str] = (),
        only: Sequence[str] = (),
    ) -> "Supernet":
        """Turn any image classifier into a supernet. The model is copied, its weights are taken
        as they are.

        Args:
            model: an `nn.Module` from images [B, C, H, W] to logits [B, classes].
            example_input: images of the size to be used, any batch size.
            divisor: widths are multiples of it; by default 8, or 1 for networks with no layer
                of 128 channels or more.
            min_ratio: smallest width of an axis as a share of its full width.
            ignore: patterns of modules that stay whole, such as "layer4" or "*.conv1".
            only: patterns of modules outside of which everything stays whole; empty for all.

        Raises:
            TraceError: the model cannot be traced; names the operation and the line.
            OptionError: an option is out of range, or a pattern matches no layer.
        """
        sizes: dict[str, Any] = {"divisor": divisor, "min_ratio": min_ratio}
        return cls(trace(model, example_input, **sizes, ignore=ignore, only=only))

    def forward(
        self,
        images: Tensor,
        subnet: Subnet | None = None,
        *,
        stats: "Stats | StatsRecorder | None" = None,
        direct: bool = False,
    ) -> Tensor:
        """Logits [B, classes] of the main network, or of a subnet in the same weights.

        In training mode a subnet normalises with the statistics of the batch and writes none. In
        evaluation mode it uses `stats`, by default the prefix of the main network's statistics.

        Args:
            images: [B, C, H, W].
            subnet: None for the main network.
            stats: BatchNorm statistics of this subnet, as `calibrate` gives them.
            direct: let the backward pass add to the parameters' `.grad` itself, which costs what
                the subnet alone costs. Autograd does not see the parameters then: their hooks do
                not run, and gradients reach them by `backward()` only, once for each forward
                [ours].

        Raises:
            ValueError: the subnet is of another space, or the statistics are of another subnet.
        """
        if subnet is None and stats is None and not direct:
            return self.model(images)
        return self._run(images, subnet or self.space.full, stats, direct)

    def cost(self, subnet: Subnet | None = None) -> Cost:
        """MACs for one sample of the example input's shape, and parameters, of a subnet or, without
        one, of the main network. Touches no tensor. Raises ValueError for a subnet of another
        space."""
        return self.space.cost(subnet)

    def extract(self, subnet: Subnet, stats: Stats | None = None) -> nn.Module:
        """The subnet as a module of ordinary layers with weights of its own, in the mode
        (training or evaluation) of the supernet, which stays as it was.

        Args:
            subnet: what to keep.
            stats: its BatchNorm statistics; by default the prefix of the main network's.

        Raises:
            ValueError: the subnet is of another space, or the statistics are of another subnet.
        """
        self.space.validate(subnet)
        return extract(self.model, self._layouts, self._merges, subnet, stats)

    def rank(self, scores: Mapping[str, Tensor]) -> None:
        """Put the units of each axis in the order of their scores, the best first, which leaves the
        output of the main network as it is; see `ranking.importance` for scores.

        Args:
            scores: axis -> [size]; axes that are not named keep their order.

        Raises:
            ValueError: an axis is unknown, or a score has another length than its axis.
        """
        rank(self, scores)

    @cached_property
    def segments(self) -> dict[str, tuple[Segments | None, ...]]:
        """What each dimension of the parameters and buffers that a subnet may cut is made of, by
        name; a tensor that several layers share is there once."""
        found: dict[str, tuple[Segments | None, ...]] = {}
        seen: set[int] = set()
        for node in self.model.graph.nodes:
            for name, dims in self._layouts[node.name].tensors.items():
                full = name if node.op == "get_attr" else f"{node.target}.{name}"
                tensor = _tensor(self.model, full)
                if any(dims) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[full] = dims
        return found

    def slices(self, subnet: Subnet) -> dict[str, dict[int, Ranges]]:
        """The parameters that a subnet cuts: name -> {dimension: kept (start, stop) ranges}."""
        cuts: dict[str, dict[int, Ranges]] = {}
        for node in self.model.graph.nodes:
            layout = self._layouts[node.name]
            for name in layout.tensors:
                full = name if node.op == "get_attr" else f"{node.target}.{name}"
                ranges = layout.ranges(name, subnet)
                if ranges and full in dict(self.model.named_parameters()):
                    cuts[full] = ranges
        return cuts

    @cached_property
    def _called(self) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
        """The layers that the graph calls, and the names of their parameters."""
        found = {}
        for node in self.model.graph.nodes:
            if node.op == "call_module":
                module = self.model.get_submodule(str(node.target))
                found[str(node.target)] = module, tuple(n for n, _ in module.named_parameters())
        return found

    def extra_repr(self) -> str:
        """The line that stands above the layers in `repr`."""
        return f"{self.space!r}, {len(self.frozen)} frozen layers"

    def _repr_html_(self) -> str:
        frozen = table(("frozen", "size", "why"), [(f.name, f.size, f.reason) for f in self.frozen])
        shown = folded(f"{len(self.frozen)} frozen layers", frozen) if self.frozen else ""
        return self.space._repr_html_() + shown

    # -- copies ---------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> "Supernet":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        # torch.fx would trace the model anew when it is read, under other names
        raise TypeError(
            "a Supernet cannot be pickled, so neither torch.save nor another process takes it; "
            "save net.model.state_dict(), trace the dense model again and load it there"
        )

    # -- the sliced run -------------------------------------------------------------

    def _run(
        self,
        images: Tensor,
        subnet: Subnet,
        stats: "Stats | StatsRecorder | None",
        direct: bool,
    ) -> Tensor:
        self.space.validate(subnet)
        env: dict[str, Any] = {}
        out: Any = None
        for node in self.model.graph.nodes:
            layout = self._layouts[node.name]
            if not layout.gates.isdisjoint(subnet.dropped):
                continue
            merge = self._merges.get(node.name)
            if merge is not None and merge.block in subnet.dropped:
                env[node.name] = env[cast(fx.Node, node.args[merge.shortcut]).name]
            elif node.op == "placeholder":
                env[node.name] = images
            elif node.op == "get_attr":
                env[node.name] = self._attribute(str(node.target), layout, subnet, direct)
            elif node.op == "output":
                out = _load(node.args[0], env, subnet)
            else:
                args, kwargs = arguments(node, layout)
                call = self._call(node, layout, subnet, stats, direct)
                env[node.name] = call(
                    *(_load(arg, env, subnet) for arg in args),
                    **{name: _load(value, env, subnet) for name, value in kwargs.items()},
                )
            for dead in self._last_uses.get(node.name, ()):
                env.pop(dead, None)
        return out

    def _attribute(self, name: str, layout: Layout, subnet: Subnet, direct: bool) -> Any:
        owner, _, leaf = name.rpartition(".")
        value = getattr(self.model.get_submodule(owner), leaf)
        if direct and isinstance(value, nn.Parameter):
            return layout.leaf(name, value, subnet)
        if name not in layout.tensors:
            return value
        part = layout.cut(name, value, subnet)
        # a buffer may be written by the function that gets it, such as F.batch_norm
        return part if isinstance(value, nn.Parameter) or not self.training else part.clone()

    def _call(
        self,
        node: fx.Node,
        layout: Layout,
        subnet: Subnet,
        stats: "Stats | StatsRecorder | None",
        direct: bool,
    ) -> Callable[..., Any]:
        if node.op == "call_function":
            return cast(Callable[..., Any], node.target)
        if node.op == "call_method":
            name = str(node.target)
            return lambda receiver, *args, **kwargs: getattr(receiver, name)(*args, **kwargs)
        module, parameters = self._called[str(node.target)]
        tensors: dict[str, Tensor | None] = {}
        reads = stats is not None or not module.training or "weight" not in layout.tensors
        unread = _STATISTICS if layout.norm and not reads else ()
        for name in layout.tensors:
            if name in unread or (direct and name in parameters):
                continue
            whole = _tensor(module, name)
            part = layout.cut(name, whole, subnet)
            if part is not whole:
                tensors[name] = part
        if direct:
            for name in parameters:
                parameter = cast(nn.Parameter, _tensor(module, name))
                tensors[name] = layout.leaf(name, parameter, subnet)
        # sizes change with the tensors, or with the input alone where there is none to cut
        attributes = layout.sizes(subnet) if tensors or not layout.tensors else {}
        kind = layout.narrow_class if tensors else None
        if layout.norm and getattr(module, "running_mean", None) is not None:
            _normalise(str(node.target), module, tensors, attributes, stats)
        if module.training:
            tensors.update({name: _tensor(module, name).clone() for name in layout.scratch})
        return narrowed(module, tensors, attributes, kind) if tensors or attributes else module


def _normalise(
    layer: str,
    module: nn.Module,
    tensors: dict[str, Tensor | None],
    attributes: dict[str, Any],
    stats: "Stats | StatsRecorder | None",
) -> None:
    """Choose the statistics that a subnet's BatchNorm uses; the main network's are only read."""
    cut = tensors.get("running_mean")
    mean = cast(Tensor, module.running_mean if cut is None else cut)
    if isinstance(stats, StatsRecorder):
        tensors.update(stats.buffers(layer, mean, cast(Tensor, module.num_batches_tracked)))
        attributes.update(training=True, momentum=None)
    elif module.training:
        tensors.update(running_mean=None, running_var=None, num_batches_tracked=None)
        attributes["track_running_stats"] = False
    elif stats is not None:
        tensors.update(measured(layer, stats, mean))


def _load(value: Any, env: Mapping[str, Any], subnet: Subnet) -> Any:
    if isinstance(value, fx.Node):
        return env[value.name]
    if isinstance(value, Extent):
        return value.at(subnet.widths)
    if isinstance(value, (tuple, list)):
        return type(value)(_load(item, env, subnet) for item in value)
    if isinstance(value, slice):
        return slice(*(_load(part, env, subnet) for part in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: _load(item, env, subnet) for key, item in value.items()}
    return value


def _tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner) if owner else module, leaf)


def _last_uses(graph: fx.Graph) -> dict[str, list[str]]:
    """For each node the values that nothing after it needs, all by name."""
    seen: set[fx.Node] = set()
    last: dict[str, list[str]] = {}
    for node in reversed(graph.nodes):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                last.setdefault(node.name, []).append(source.name)
    return last
