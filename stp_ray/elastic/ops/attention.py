"""Rules of attention, as a layer and as a function."""

import operator

from torch import fx

from ...errors import TraceError
from ..attention import MultiheadSelfAttention, WindowSelfAttention, WindowSelfAttentionV2
from ..dims import Atom, Dim, length
from .visit import Size, Value, Visit, spread, unknown


def multihead_attention(visit: Visit) -> Value:
    module, inputs = (
        visit.module,
        [visit.argument(i, n) for i, n in enumerate(("query", "key", "value"))],
    )
    x = visit.value(inputs[0])
    tokens = 1 if module.batch_first else 0
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
        tensors = [visit.tensor(name) for name, _ in module.named_parameters()]
        given = map(visit.value, visit.node.all_input_nodes)  # a mask among them
        visit.freeze(*given, *tensors, reason="attention other than plain self-attention")
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
    factor, elastic = spread(visit.resolved(x[:-1]))
    visit.macs(3 * factor, *elastic, x[-1], heads)
    visit.macs(2 * factor, *elastic, x[tokens], heads)
    visit.macs(factor, *elastic, heads, out)
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
    visit.freeze(x[:-1], reason="attends over an elastic dimension")
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


def scaled_dot_product(visit: Visit) -> Value:
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
    factor, elastic = spread(visit.resolved([*q[:-1], k[-2]]))
    visit.macs(factor, *elastic, q[-1])
    visit.macs(factor, *elastic, v[-1])
    return (*q[:-1], v[-1])
