"""One rule per operation: how axes pass through it, what it needs to run sliced, what it costs.

A rule is a function from a `Visit` (one node of the traced graph) to the dimensions of the
node's output. On the way it unifies dimensions that must agree and writes into the node's
`Step` which parameters have which dimensions, which attributes or arguments hold sizes, and
how many multiply-accumulates it makes. The same step then runs a subnet as views, extracts it
as copies and prices it as integers. An operation without a rule freezes whatever reaches it.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..errors import TraceError
from .attention import MultiheadSelfAttention, WindowSelfAttention, WindowSelfAttentionV2
from .dims import Atom, Dim, Dims, Frozen, constant, length, merge
from .flag import TrainingFlag

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


def _spread(dims: Sequence[Dim]) -> tuple[int, tuple[Dim, ...]]:
    """The product of several dimensions as (constant factor, elastic dimensions)."""
    factor, elastic = 1, []
    for dim in dims:
        if any(atom.variable is not None for atom in dim):
            elastic.append(dim)
        else:
            factor *= length(dim)
    return factor, tuple(elastic)


Rule = Callable[[Visit], Value]


# -- layers -----------------------------------------------------------------------------


def linear(visit: Visit) -> Value:
    x = visit.x
    module = visit.module
    weight = visit.tensor("weight", None, x[-1])
    out = visit.dims.produced(weight[0], visit.layer)
    visit.tensor("bias", out)
    visit.step.attributes.update(in_features=Size(x[-1]), out_features=Size(out))
    factor, elastic = _spread(visit.resolved(x[:-1]))
    visit.macs(factor, *elastic, x[-1], out)
    assert module is not None
    return (*x[:-1], out)


def convolution(visit: Visit) -> Value:
    x, module = visit.x, visit.module
    if len(x) != module.weight.dim():
        visit.freeze(x, reason="convolution of an input without a batch dimension")
        visit.step.opaque = True
        return visit.constants()
    visit.freeze(x[2:], reason="convolves over an elastic dimension")
    channels, groups = x[1], module.groups
    area = prod(visit.shape[2:]) * prod(module.kernel_size) * visit.shape[0]
    if groups == 1:
        weight = visit.tensor("weight", None, channels)
        out = visit.dims.produced(weight[0], visit.layer)
        visit.macs(area, channels, out)
    else:
        # Whole groups move together: the input and the output shrink by groups.
        fan_in, fan_out = module.in_channels // groups, module.out_channels // groups
        unit = "channels" if fan_in == fan_out == 1 else "groups"
        (group,) = visit.dims.fresh(groups, unit=unit)
        visit.unify(channels, (Atom(groups * fan_in, group.variable, fan_in),))
        out = (Atom(groups * fan_out, group.variable, fan_out),)
        visit.tensor("weight", out)
        visit.dims.produced(out, visit.layer)
        visit.macs(area * fan_in, out)
        visit.step.attributes["groups"] = Size(out, per=fan_out)
    visit.tensor("bias", out)
    visit.step.attributes.update(in_channels=Size(channels), out_channels=Size(out))
    return (x[0], out, *(constant(n) for n in visit.shape[2:]))


def standardised_convolution(visit: Visit) -> Value:
    """timm's convolution whose filters are brought to mean 0 and a learned gain in every call."""
    out = convolution(visit)
    visit.tensor("gain", out[1])
    return out


def batch_norm(visit: Visit) -> Value:
    x = visit.x
    for name in ("weight", "bias", "running_mean", "running_var"):
        visit.tensor(name, x[1])
    visit.step.attributes["num_features"] = Size(x[1])
    visit.step.norm = True
    return x


def prelu(visit: Visit) -> Value:
    """A slope for all channels, or for each."""
    x = visit.x
    if visit.module.num_parameters == 1:
        visit.tensor("weight", None)
        return x
    visit.tensor("weight", x[1])
    visit.step.attributes["num_parameters"] = Size(x[1])
    return x


def batch_norm_and_more(visit: Visit) -> Value:
    """timm's BatchNorm with activation and dropout inside."""
    inner = (visit.module.drop, visit.module.act)
    if any(module_rule(part) is not elementwise or any(part.parameters()) for part in inner):
        return unknown(visit)
    return batch_norm(visit)


def layer_norm(visit: Visit) -> Value:
    x = visit.x
    normalised = x[-len(visit.module.normalized_shape) :]
    for name in ("weight", "bias"):
        visit.tensor(name, *normalised)
    visit.step.attributes["normalized_shape"] = tuple(Size(dim) for dim in normalised)
    return x


def group_norm(visit: Visit) -> Value:
    x, module = visit.x, visit.module
    per_group = module.num_channels // module.num_groups
    for name in ("weight", "bias"):
        visit.tensor(name, x[1])
    visit.step.attributes["num_channels"] = Size(x[1])
    if module.num_groups > 1:  # a single group spans all channels, however many they are
        visit.dims.coarsen(x[1], per_group, f"groups that its pieces do not fit: {visit.source}")
        visit.step.attributes["num_groups"] = Size(x[1], per=per_group)
    return x


def multihead_attention(visit: Visit) -> Value:
    module, inputs = (
        visit.module,
        [visit.argument(i, n) for i, n in enumerate(("query", "key", "value"))],
    )
    x = visit.value(inputs[0])
    batch, tokens = (0, 1) if module.batch_first else (1, 0)
    if x is not None and len(x) == 3 and visit.shape_of(inputs[0])[tokens] % visit.batch == 0:
        raise TraceError(
            f"{visit.source} attends over the images of a batch; expected an operation that treats "
            "every image alike; batch_first=True is for tensors [B, tokens, channels]"
        )
    plain = (
        inputs[0] is inputs[1] is inputs[2]
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
        and (visit.argument(4, "need_weights", True) is False or _first_alone(visit.node))
        and all(
            visit.argument(position, name) is None
            for position, name in ((3, "key_padding_mask"), (5, "attn_mask"))
        )
        and len(x) == 3
    )
    if not plain:
        visit.freeze(
            x, *map(visit.value, inputs[1:]), reason="attention other than plain self-attention"
        )
        for name, _ in module.named_parameters():
            visit.tensor(name)
        visit.step.opaque = True
        return visit.constants()
    heads = visit.dims.fresh(module.num_heads, factor=module.head_dim, unit="heads")
    visit.dims.produced(heads, visit.layer)
    visit.tensor("in_proj_weight", heads * 3, x[-1])
    visit.tensor("in_proj_bias", heads * 3)
    weight = visit.tensor("out_proj.weight", None, heads)
    out = visit.dims.produced(weight[0], f"{visit.layer}.out_proj")
    visit.tensor("out_proj.bias", out)
    visit.step.narrow_class = MultiheadSelfAttention
    visit.step.attributes.update(
        {
            "embed_dim": Size(x[-1]),
            "num_heads": Size(heads, per=module.head_dim),
            "out_proj.in_features": Size(heads),
            "out_proj.out_features": Size(out),
        }
    )
    rows, count = visit.shape_of(inputs[0])[batch], visit.shape_of(inputs[0])[tokens]
    visit.macs(3 * rows * count, x[-1], heads)
    visit.macs(2 * rows * count * count, heads)
    visit.macs(rows * count, heads, out)
    return [(*x[:-1], out), *visit.constants()[1:]]


def _first_alone(node: fx.Node) -> bool:
    """Whether of the values that a node yields the model reads only the first."""
    return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


def window_attention(visit: Visit) -> Value:
    """torchvision's Swin attention: a table of position biases with a column for each head."""
    head, out = _window_attention(visit)
    visit.tensor("relative_position_bias_table", None, (head,))
    visit.step.narrow_class = WindowSelfAttention
    return out


def window_attention_v2(visit: Visit) -> Value:
    """Swin V2: the biases come from a small network, and each head has a temperature."""
    head, out = _window_attention(visit)
    hidden = visit.tensor("cpb_mlp.0.weight")[0]
    visit.tensor("cpb_mlp.0.bias", hidden)
    visit.dims.freeze([hidden], "", report=False)
    visit.tensor("cpb_mlp.2.weight", (head,), hidden)
    visit.tensor("logit_scale", (head,))
    visit.step.narrow_class = WindowSelfAttentionV2
    visit.step.attributes["cpb_mlp.2.out_features"] = Size((head,))
    places = visit.module.relative_coords_table[..., 0].numel() * visit.batch  # once a batch
    visit.macs(2 * places, hidden)
    visit.macs(places, hidden, (head,))
    return out


def _window_attention(visit: Visit) -> tuple[Atom, Value]:
    """The heads, and the output, of attention inside windows."""
    x, module = visit.x, visit.module
    count = module.num_heads
    head_dim = module.qkv.out_features // 3 // count
    (head,) = visit.dims.fresh(count, unit="heads")
    heads: Dim = (Atom(count * head_dim, head.variable, head_dim),)
    visit.dims.produced(heads, visit.layer)
    visit.tensor("qkv.weight", heads * 3, x[-1])
    visit.tensor("qkv.bias", heads * 3)
    weight = visit.tensor("proj.weight", None, heads)
    out = visit.dims.produced(weight[0], f"{visit.layer}.proj")
    visit.tensor("proj.bias", out)
    visit.step.attributes.update(
        {
            "num_heads": Size((head,)),
            "head_dim": head_dim,
            "qkv.in_features": Size(x[-1]),
            "qkv.out_features": Size(heads * 3),
            "proj.in_features": Size(heads),
            "proj.out_features": Size(out),
        }
    )
    rows, columns = module.window_size
    (source,) = visit.node.all_input_nodes
    batch, height, width, _ = visit.shape_of(source)
    pixels = batch * (height + -height % rows) * (width + -width % columns)
    visit.macs(3 * pixels, x[-1], heads)
    visit.macs(2 * pixels * rows * columns, heads)
    visit.macs(pixels, heads, out)
    return head, (*x[:-1], out)


# -- functions of tensors ---------------------------------------------------------------


def attention(visit: Visit) -> Value:
    """F.scaled_dot_product_attention on [..., heads, tokens, head size]."""
    names = ("query", "key", "value")
    arguments = [visit.argument(position, name) for position, name in enumerate(names)]
    q, k, v = map(visit.value, arguments)
    mask = visit.value(visit.argument(3, "attn_mask"))
    if not len(q) == len(k) == len(v) or visit.argument(7, "enable_gqa", False):
        return unknown(visit)
    for place in range(-len(q), -2):
        if len({length(dims[place]) for dims in (q, k, v)}) > 1:
            return unknown(visit)
        visit.unify(q[place], k[place])
        visit.unify(q[place], v[place])
    visit.unify(q[-1], k[-1])
    visit.unify(k[-2], v[-2])
    visit.freeze((q[-2], k[-2]), reason="attends over an elastic dimension")
    for own, dim in zip(reversed(mask or ()), reversed((*q[:-1], k[-2])), strict=False):
        if length(own) == length(dim):
            visit.unify(own, dim)
    factor, elastic = _spread(visit.resolved([*q[:-1], k[-2]]))
    visit.macs(factor, *elastic, q[-1])
    visit.macs(factor, *elastic, v[-1])
    return (*q[:-1], v[-1])


def einsum(visit: Visit) -> Value:
    """Two tensors, one letter for each dimension; what is summed over is multiplied."""
    equation, *operands = visit.node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    inputs, _, result = str(equation).replace(" ", "").partition("->")
    letters = inputs.split(",")
    values = [visit.value(operand) for operand in operands]
    plain = len(letters) == 2 == len(values) and (inputs + result).replace(",", "").isalpha()
    summed = (set(letters[0]) & set(letters[-1])) - set(result)
    if not plain or not summed or any(len(set(part)) < len(part) for part in letters):
        return unknown(visit)
    dims: dict[str, Dim] = {}
    for part, value in zip(letters, values, strict=True):
        for letter, dim in zip(part, value, strict=True):
            if length(dims.setdefault(letter, dim)) != length(dim):
                return unknown(visit)  # broadcast
            visit.unify(dims[letter], dim)
    # A sum over one element would not be a product of matrices any more.
    visit.freeze(tuple(dims[letter] for letter in summed), reason="sums over an elastic dimension")
    if not set(dims) <= set(result) | summed:  # summed before it is multiplied
        return unknown(visit)
    factor, elastic = _spread(visit.resolved(dims.values()))
    visit.macs(factor, *elastic)
    return tuple(dims[letter] for letter in result)


def elementwise(visit: Visit) -> Value:
    """Any number of tensors of one shape, up to broadcasting."""
    inputs = [
        value
        for argument in (*visit.node.args, *visit.node.kwargs.values())
        if isinstance(value := visit.value(argument), tuple)
    ]
    if not isinstance(visit.shape, torch.Size):
        return visit.constants()
    out: list[Dim] = []
    for place, size in enumerate(reversed(visit.shape), start=1):
        aligned = [x[-place] for x in inputs if len(x) >= place and length(x[-place]) == size]
        for other in aligned[1:]:
            visit.unify(aligned[0], other)
        out.append(aligned[0] if aligned else constant(size))
    return tuple(reversed(out))


def spatial(visit: Visit) -> Value:
    """Works on the trailing dimensions, leaves [N, C] alone: pooling, interpolation."""
    x = visit.x
    changed = [
        place for place, size in enumerate(visit.shape) if length(x[place]) != size or place > 1
    ]
    visit.freeze(
        tuple(x[place] for place in changed if not visit.dims.is_constant(x[place])),
        reason="works across an elastic dimension",
    )
    return tuple(
        constant(size) if place in changed else x[place] for place, size in enumerate(visit.shape)
    )


def padding(visit: Visit) -> Value:
    x, pad = visit.x, visit.argument(1, "pad")
    out = list(x)
    for place in range(len(pad) // 2):  # pairs, from the last dimension on
        if any(amount != 0 for amount in pad[2 * place : 2 * place + 2]):
            visit.freeze((x[-1 - place],), reason="padding of an elastic dimension")
            out[-1 - place] = constant(visit.shape[-1 - place])
    return tuple(out)


def along(visit: Visit) -> Value:
    """Softmax and its like: couples the elements of one dimension, keeps the shape."""
    x = visit.x
    dim = getattr(visit.module, "dim", None) if visit.maybe_module else visit.argument(1, "dim")
    if dim is None or not visit.dims.is_constant(x[dim]):
        visit.freeze(x, reason="normalises over an elastic dimension")
    return x


def normalised(visit: Visit) -> Value:
    """F.normalize: over whatever is left of the dimension, as LayerNorm is."""
    return visit.x


def reduction(visit: Visit) -> Value:
    return _reduced(visit, visit.argument(1, "dim"))


def _reduced(visit: Visit, over: int | Sequence[int] | None) -> Value:
    x = visit.x
    if not isinstance(visit.shape, torch.Size) or over is None:
        visit.freeze(x, reason="reduces over everything")
        return visit.constants()
    gone = {d % len(x) for d in ([over] if isinstance(over, int) else over)}
    keep = len(visit.shape) == len(x)
    return tuple(
        constant(1) if place in gone else dim
        for place, dim in enumerate(x)
        if keep or place not in gone
    )


def p_norm(visit: Visit) -> Value:
    """x.norm(p, dim, keepdim)."""
    return _reduced(visit, visit.argument(2, "dim"))


def functional_linear(visit: Visit) -> Value:
    x, weight = (visit.value(visit.argument(i, n)) for i, n in enumerate(("input", "weight")))
    bias = visit.value(visit.argument(2, "bias"))
    if weight is None or len(weight) != 2:
        return unknown(visit)
    visit.unify(x[-1], weight[1])
    out = visit.dims.produced(weight[0], visit.layer)
    if bias is not None:
        visit.unify(bias[0], out)
    factor, elastic = _spread(visit.resolved(x[:-1]))
    visit.macs(factor, *elastic, x[-1], out)
    return (*x[:-1], out)


def functional_layer_norm(visit: Visit) -> Value:
    x, shape = visit.x, visit.argument(1, "normalized_shape")
    normalised = x[-len(shape) :]
    for position, name in ((2, "weight"), (3, "bias")):
        value = visit.value(visit.argument(position, name))
        for dim, own in zip(normalised, value or (), strict=False):
            visit.unify(own, dim)
    visit.step.arguments[visit.key(1, "normalized_shape")] = [Size(dim) for dim in normalised]
    return x


def matmul(visit: Visit) -> Value:
    a, b = visit.value(visit.argument(0, "input")), visit.value(visit.argument(1, "other"))
    if a is None or b is None or len(a) < 2 or len(b) not in (2, len(a)):
        return unknown(visit)
    visit.unify(a[-1], b[-2])
    if len(b) == 2:
        weight: Any = visit.argument(1, "other")
        if weight.op == "get_attr":  # a layer that is written by hand
            visit.dims.produced(b[-1], str(weight.target))
        factor, elastic = _spread(visit.resolved(a[:-1]))
        visit.macs(factor, *elastic, a[-1], b[-1])
        return (*a[:-1], b[-1])
    shared = []
    for one, other in zip(a[:-2], b[:-2], strict=True):
        if length(one) == length(other):
            visit.unify(one, other)
        shared.append(one if length(one) >= length(other) else other)
    factor, elastic = _spread(visit.resolved([*shared, a[-2], b[-1]]))
    visit.macs(factor, *elastic, a[-1])
    return (*shared, a[-2], b[-1])


def concatenate(visit: Visit) -> Value:
    parts = visit.parts()
    dim = visit.argument(1, "dim", 0) % len(visit.shape)
    first = parts[0]
    for part in parts[1:]:
        for place in range(len(first)):
            if place != dim:
                visit.unify(first[place], part[place])
    joined = tuple(atom for part in parts for atom in part[dim])
    return (*first[:dim], joined, *first[dim + 1 :])


def chunk(visit: Visit) -> Value:
    """Equal parts of an elastic dimension shrink together."""
    x, count = visit.x, visit.argument(1, "chunks")
    dim = visit.argument(2, "dim", 0) % len(x)
    if visit.dims.is_constant(x[dim]):
        return [(*x[:dim], constant(part[dim]), *x[dim + 1 :]) for part in visit.shape]
    if length(x[dim]) % count:
        return unknown(visit)
    part = visit.dims.fresh(length(x[dim]) // count)
    visit.unify(x[dim], part * count)
    return [(*x[:dim], part, *x[dim + 1 :])] * count


def gated(visit: Visit) -> Value:
    """One half of a dimension gates the other; they shrink together."""
    x = visit.x
    given = visit.argument(1, "dim", -1) if visit.maybe_module is None else visit.module.dim
    dim = given % len(x)
    if visit.dims.is_constant(x[dim]):
        return visit.constants()
    half = visit.dims.fresh(length(x[dim]) // 2)
    visit.unify(x[dim], half * 2)
    return (*x[:dim], half, *x[dim + 1 :])


def split(visit: Visit) -> Value:
    """Parts of an elastic dimension: of one size, which shrink together, or of several."""
    x, given = visit.x, visit.argument(1, "split_size_or_sections")
    key = visit.key(1, "split_size_or_sections")
    if given is None:  # the method calls it otherwise
        given, key = visit.argument(1, "split_size"), "split_size"
    dim = visit.argument(2, "dim", 0) % len(x)
    sizes = [part[dim] for part in visit.shape]
    if visit.dims.is_constant(x[dim]):
        parts = [constant(size) for size in sizes]
    elif isinstance(given, (tuple, list)):
        parts = [visit.dims.fresh(size) for size in sizes]
        visit.step.arguments[key] = [Size(part) for part in parts]
    elif len(set(sizes)) > 1:
        return unknown(visit)
    else:
        parts = [visit.dims.fresh(sizes[0])] * len(sizes)
        visit.step.arguments[key] = Size(parts[0])
    visit.unify(x[dim], tuple(atom for part in parts for atom in part))
    return [(*x[:dim], part, *x[dim + 1 :]) for part in parts]


def unbind(visit: Visit) -> Value:
    x, dim = visit.x, visit.argument(1, "dim", 0)
    dim %= len(x)
    visit.freeze((x[dim],), reason="taken apart along an elastic dimension")
    return [(*x[:dim], *x[dim + 1 :])] * len(visit.shape)


def stack(visit: Visit) -> Value:
    parts = visit.parts()
    for part in parts[1:]:
        for one, other in zip(parts[0], part, strict=True):
            visit.unify(one, other)
    dim = visit.argument(1, "dim", 0) % len(visit.shape)
    return (*parts[0][:dim], constant(len(parts)), *parts[0][dim:])


def roll(visit: Visit) -> Value:
    x, over = visit.x, visit.argument(2, "dims")
    over = range(len(x)) if over is None else [over] if isinstance(over, int) else over
    visit.freeze(tuple(x[place] for place in over), reason="rolls an elastic dimension")
    return x


def merge_patches(visit: Visit) -> Value:
    """Swin's patch merging: the four pixels of a 2 x 2 square side by side."""
    x = visit.x
    return (*(constant(n) for n in visit.shape[:-1]), x[-1] * 4)


def permute(visit: Visit) -> Value:
    x = visit.x
    order: Any = visit.node.args[1:] or visit.node.kwargs["dims"]
    if isinstance(order[0], (tuple, list)):
        (order,) = order
    return tuple(x[place] for place in order)


def permute_module(visit: Visit) -> Value:
    x = visit.x
    return tuple(x[place] for place in visit.module.dims)


def transpose(visit: Visit) -> Value:
    x = list(visit.x)
    one = visit.argument(1, "dim0", visit.node.kwargs.get("axis0"))
    other = visit.argument(2, "dim1", visit.node.kwargs.get("axis1"))
    x[one], x[other] = x[other], x[one]
    return tuple(x)


def unsqueeze(visit: Visit) -> Value:
    x, dim = list(visit.x), visit.argument(1, "dim")
    x.insert(dim if dim >= 0 else dim + len(x) + 1, constant(1))
    return tuple(x)


def squeeze(visit: Visit) -> Value:
    x = visit.x
    over = visit.argument(1, "dim")
    asked = {d % len(x) for d in ([over] if isinstance(over, int) else over or range(len(x)))}
    gone = tuple(place for place in sorted(asked) if length(x[place]) == 1)
    if len(gone) < len(asked):  # a width of one stays a dimension
        visit.step.arguments[visit.key(1, "dim")] = gone
    return tuple(dim for place, dim in enumerate(x) if place not in gone)


def expand(visit: Visit) -> Value:
    x = visit.x
    sizes, key = _sizes(visit)
    lead = len(visit.shape) - len(x)
    out = tuple(
        x[place - lead] if place >= lead and length(x[place - lead]) == size else constant(size)
        for place, size in enumerate(visit.shape)
    )
    _rewrite_sizes(visit, sizes, key, out)
    return out


def repeat(visit: Visit) -> Value:
    """Copies along some dimensions; the others stay as they are."""
    x = visit.x
    lead = len(visit.shape) - len(x)
    out: list[Dim] = [constant(size) for size in visit.shape]
    for place, dim in enumerate(x, start=lead):
        if length(dim) == visit.shape[place]:
            out[place] = dim
        else:
            visit.freeze((dim,), reason="repeats an elastic dimension")
    return tuple(out)


def reshape(visit: Visit) -> Value:
    """view, reshape: neighbouring dimensions merge or split; see `regroup`."""
    sizes, key = _sizes(visit)
    out = regroup(visit)
    _rewrite_sizes(visit, sizes, key, out)
    return out


def regroup(visit: Visit) -> Value:
    """Row-major regrouping. Input and output dimensions are cut into the smallest runs of equal
    product; in a run, one elastic dimension may absorb constants around it or give them up."""
    x = visit.x
    if x is None:
        return unknown(visit)
    out: list[Dim] = []
    before, after = list(x), list(visit.shape)
    # The batch, alone or merged: no other dimension is a multiple of it.
    batch = [place for place, dim in enumerate(x) if length(dim) % visit.batch == 0]
    while before or after:
        start = len(x) - len(before)
        source, target = before[:1], after[:1]
        left, right = before[1:], after[1:]
        while (a := prod(map(length, source))) != (b := prod(target)) or not source or not target:
            if (a < b or not source) and left:
                source.append(left.pop(0))
            elif right:
                target.append(right.pop(0))
            else:
                break
        # Trailing ones belong to this run.
        while right and right[0] == 1 and not left:
            target.append(right.pop(0))
        while left and length(left[0]) == 1 and not right:
            source.append(left.pop(0))
        with_batch = any(start <= place < start + len(source) for place in batch)
        out += _regroup_run(visit, source, target, with_batch)
        before, after = left, right
    return tuple(out)


def _regroup_run(visit: Visit, source: list[Dim], target: list[int], with_batch: bool) -> list[Dim]:
    resolved = visit.resolved(source)
    if all(visit.dims.is_constant(dim) for dim in resolved):
        return [constant(size) for size in target]
    if with_batch:
        visit.freeze(tuple(source), reason="reshape that mixes an elastic dimension with the batch")
        return [constant(size) for size in target]
    whole = merge(resolved)
    wide = [place for place, size in enumerate(target) if size > 1]
    if whole is None or len(whole) > 64:
        visit.freeze(tuple(source), reason="reshape that mixes several elastic dimensions")
        return [constant(size) for size in target]
    if len(wide) == 1:
        return [whole if place == wide[0] else constant(1) for place in range(len(target))]
    # A split: one of the parts stays elastic, the ones inside and outside it are constant.
    place = _elastic_part(whole, [target[i] for i in wide])
    size = target[wide[place]]
    outer = prod(target[i] for i in wide[:place])
    inner = prod(target[i] for i in wide[place + 1 :])
    (part,) = visit.dims.fresh(size, unit="heads" if inner > 1 else "channels")
    visit.unify(whole, (Atom(size * inner, part.variable, inner),) * outer)
    return [(part,) if i == wide[place] else constant(n) for i, n in enumerate(target)]


def _elastic_part(whole: Dim, sizes: list[int]) -> int:
    """Which part of a split dimension is the elastic one: the one whose inner product is the
    factor of the atoms where they already have one, else heads before head size: the middle
    of (3, heads, size), the first of (heads, size)."""
    factors = {atom.factor for atom in whole if atom.variable is not None}
    if len(factors) == 1 and (factor := factors.pop()) > 1:
        for place in range(len(sizes)):
            if prod(sizes[place + 1 :]) == factor:
                return place
    return 1 if len(sizes) > 2 else 0


def _sizes(visit: Visit) -> tuple[Sequence[Any], int | str | None]:
    """The sizes of a reshape or expand, and the argument that holds them (None: all of the
    positional ones)."""
    args = visit.node.args[1:]
    if len(args) == 1 and isinstance(args[0], (tuple, list)):
        return args[0], 1
    if args:
        return args, None
    for name in ("shape", "size"):
        if name in visit.node.kwargs:
            return visit.node.kwargs[name], name  # type: ignore[return-value]
    return (), None


def _rewrite_sizes(
    visit: Visit, sizes: Sequence[Any], key: int | str | None, out: Sequence[Dim]
) -> None:
    """Elastic sizes follow the subnet; the others stay as the model wrote them, unless it computed
    them from one that is elastic. Which ones are elastic is known only at the end, so every size
    that could be is listed."""
    new = [
        Size(dim) if not visit.dims.is_constant(dim) or visit.origins(given) else None
        for given, dim in zip(sizes, out, strict=True)
    ]
    if key is None:
        for place, size in enumerate(new, start=1):
            if size is not None:
                visit.step.arguments[place] = size
    else:
        visit.step.arguments[key] = new


def index(visit: Visit) -> Value:
    """x[...] of a tensor, a tuple or a shape."""
    of, what = visit.node.args
    x = visit.value(of)
    if isinstance(x, list):
        return x[what] if isinstance(what, (int, slice)) else unknown(visit)
    if not isinstance(x, tuple):
        return visit.constants()
    items = list(what) if isinstance(what, tuple) else [what]
    if Ellipsis in items:
        place = items.index(Ellipsis)
        others = sum(item is not None for item in items) - 1
        items[place : place + 1] = [slice(None)] * (len(x) - others)
    rest, out = list(x), []
    for item in items:
        if item is None:
            out.append(constant(1))
        elif isinstance(item, slice) and _takes_all(item, length(rest[0])):
            out.append(rest.pop(0))
        elif isinstance(item, (int, slice)):
            dim = rest.pop(0)
            visit.freeze((dim,), reason="index into an elastic dimension")
            if isinstance(item, slice):
                out.append(constant(visit.shape[len(out)]))
        elif isinstance(taken := visit.value(item), tuple) and item is items[-1]:
            visit.freeze((rest.pop(0),), reason="index into an elastic dimension")
            out += taken  # rows of a table, by a tensor of their numbers
        else:
            return unknown(visit)
    return (*out, *rest)


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


def _takes_all(part: slice, size: int) -> bool:
    """Whether a slice leaves nothing out, of `size` elements or of fewer."""
    return (
        part.start in (None, 0)
        and part.step in (None, 1)
        and (part.stop is None or (isinstance(part.stop, int) and part.stop >= size))
    )


def passive(visit: Visit) -> Value:
    """Yields no tensor (a shape, a size, an assertion) or integers computed from one."""
    if isinstance(visit.shape, (torch.Size, list)) and tensors_in(visit.shape):
        return unknown(visit)
    return None


def tensors_in(shape: Shape) -> bool:
    """Whether a node yields a tensor, alone or among others."""
    return isinstance(shape, torch.Size) or (
        isinstance(shape, list) and any(tensors_in(item) for item in shape)
    )


def arithmetic(visit: Visit) -> Value:
    """+ - * / of tensors (elementwise) or of integers that came from shapes."""
    return elementwise(visit) if isinstance(visit.shape, torch.Size) else None


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
        visit.step.scratch = tuple(buffer for buffer, _ in visit.module.named_buffers())
    return visit.constants()


# -- the table --------------------------------------------------------------------------

_ELEMENTWISE_MODULES = [
    "ReLU", "ReLU6", "LeakyReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Hardswish",
    "Hardsigmoid", "Hardtanh", "Sigmoid", "Tanh", "Softplus", "LogSigmoid", "Identity",
    "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout",
]  # fmt: skip
_ELEMENTWISE_NAMES = [
    "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "hardsigmoid",
    "hardtanh", "sigmoid", "tanh", "softplus", "dropout", "dropout2d", "clamp", "abs", "exp",
    "log", "sqrt", "rsqrt", "square", "contiguous", "clone", "detach", "float", "double", "half",
    "bfloat16", "type", "type_as", "to", "neg", "add", "sub", "mul", "div", "maximum", "minimum",
    "pow", "where", "masked_fill", "addcmul", "lerp",
]  # fmt: skip

MODULES: dict[type[nn.Module], Rule] = {
    TrainingFlag: passive,
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: layer_norm,
    nn.GroupNorm: group_norm,
    nn.MultiheadAttention: multihead_attention,
    nn.PReLU: prelu,
    nn.GLU: gated,
    nn.Flatten: regroup,
    nn.Softmax: along,
    **{
        getattr(nn, f"{adaptive}{kind}Pool{d}d"): spatial
        for adaptive in ("", "Adaptive")
        for kind in ("Max", "Avg")
        for d in (1, 2, 3)
    },
    nn.Upsample: spatial,
    **{getattr(nn, name): elementwise for name in _ELEMENTWISE_MODULES},
}

#: Layers of libraries that `elastic` does not import, by qualified name.
NAMED_MODULES: dict[str, Rule] = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": window_attention,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": window_attention_v2,
    "torchvision.ops.stochastic_depth.StochasticDepth": elementwise,
    "torchvision.ops.misc.Permute": permute_module,
    "timm.layers.drop.DropPath": elementwise,
    "timm.layers.norm_act.BatchNormAct2d": batch_norm_and_more,
    **{f"timm.layers.std_conv.ScaledStdConv2d{s}": standardised_convolution for s in ("", "Same")},
    **{f"timm.layers.norm.GroupNorm{one}": group_norm for one in ("", "1")},
    "timm.layers.norm.LayerNorm": layer_norm,
}

FUNCTIONS: dict[Any, Rule] = {
    **{
        function: elementwise
        for home in (torch, F)
        for name in _ELEMENTWISE_NAMES
        if callable(function := getattr(home, name, None))
    },
    **{
        function: arithmetic
        for function in (
            operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow,
        )
    },
    **{
        function: passive
        for function in (
            operator.floordiv, operator.mod, operator.eq, operator.ne, operator.lt, operator.le,
            operator.gt, operator.ge, torch._assert, getattr,
        )
    },
    operator.getitem: index,
    operator.matmul: matmul,
    torch.matmul: matmul,
    torch.bmm: matmul,
    F.linear: functional_linear,
    F.scaled_dot_product_attention: attention,
    torch.einsum: einsum,
    F.layer_norm: functional_layer_norm,
    F.adaptive_avg_pool2d: spatial,
    F.adaptive_max_pool2d: spatial,
    F.avg_pool2d: spatial,
    F.max_pool2d: spatial,
    F.interpolate: spatial,
    F.pad: padding,
    F.normalize: normalised,
    F.glu: gated,
    F.softmax: along,
    torch.softmax: along,
    torch.mean: reduction,
    torch.sum: reduction,
    torch.amax: reduction,
    torch.roll: roll,
    torch.swapaxes: transpose,
    torch.stack: stack,
    torch.split: split,
    torch.unbind: unbind,
    torch.flatten: regroup,
    torch.reshape: reshape,
    torch.permute: permute,
    torch.transpose: transpose,
    torch.unsqueeze: unsqueeze,
    torch.squeeze: squeeze,
    torch.cat: concatenate,
    torch.concat: concatenate,
    torch.chunk: chunk,
}  # fmt: skip

NAMED_FUNCTIONS: dict[str, Rule] = {
    "torchvision.models.swin_transformer._patch_merging_pad": merge_patches,
    "torchvision.ops.stochastic_depth.stochastic_depth": elementwise,
}

METHODS: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE_NAMES, elementwise),
    "size": passive,
    "dim": passive,
    "view": reshape,
    "reshape": reshape,
    "flatten": regroup,
    "permute": permute,
    "transpose": transpose,
    "swapaxes": transpose,
    "split": split,
    "unbind": unbind,
    "roll": roll,
    "norm": p_norm,
    "amax": reduction,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "expand": expand,
    "repeat": repeat,
    "mean": reduction,
    "sum": reduction,
    "softmax": along,
    "chunk": chunk,
    "matmul": matmul,
}


#: What a layer computes with; a convolution's forward calls the second.
_FORWARDS = ("forward", "_conv_forward")


def module_rule(module: nn.Module) -> Rule | None:
    """The rule of a layer: of its class, or of a base class whose forward it inherits. There is
    none for a layer whose weights are computed anew in every forward (weight norm and the like):
    its tensors cannot be cut; nor for one that does something else than its class."""
    if any(
        hasattr(part, "parametrizations")
        or any(isinstance(value, torch.Tensor) for value in vars(part).values())
        for part in module.modules()
    ):
        return None
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return None
    named = NAMED_MODULES.get(_qualified(type(module)))
    if named is not None:
        return named
    kind = type(module)
    for base in kind.__mro__:
        if base in MODULES and all(
            getattr(base, name, None) is getattr(kind, name, None) for name in _FORWARDS
        ):
            return MODULES[base]
    return None


def rule_for(node: fx.Node, module: nn.Module | None) -> Rule | None:
    """The rule of a node of a traced graph, None if there is none."""
    if module is not None:
        return module_rule(module)
    if node.op == "call_method":
        return METHODS.get(str(node.target))
    target: Any = node.target
    return FUNCTIONS.get(target) or NAMED_FUNCTIONS.get(_qualified(target))


def _qualified(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"
