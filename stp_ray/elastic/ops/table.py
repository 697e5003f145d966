"""Which rule an operation has."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..flag import TrainingFlag
from . import attention, functions, layers, reshaping
from .visit import Rule, Value, Visit, unknown

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


def batch_norm_and_more(visit: Visit) -> Value:
    """timm's BatchNorm with activation and dropout inside."""
    inner = (visit.module.drop, visit.module.act)
    if any(
        module_rule(part) is not functions.elementwise or any(part.parameters()) for part in inner
    ):
        return unknown(visit)
    return layers.batch_norm(visit)


MODULES: dict[type[nn.Module], Rule] = {
    TrainingFlag: functions.passive,
    nn.Linear: layers.linear,
    nn.Conv1d: layers.convolution,
    nn.Conv2d: layers.convolution,
    nn.Conv3d: layers.convolution,
    nn.BatchNorm1d: layers.batch_norm,
    nn.BatchNorm2d: layers.batch_norm,
    nn.BatchNorm3d: layers.batch_norm,
    nn.LayerNorm: layers.layer_norm,
    nn.RMSNorm: layers.layer_norm,
    nn.GroupNorm: layers.group_norm,
    nn.MultiheadAttention: attention.multihead_attention,
    nn.PReLU: layers.prelu,
    nn.GLU: reshaping.gated,
    nn.Flatten: reshaping.regroup,
    nn.Softmax: functions.along,
    **{
        getattr(nn, f"{adaptive}{kind}Pool{d}d"): functions.pooling(d)
        for adaptive in ("", "Adaptive")
        for kind in ("Max", "Avg")
        for d in (1, 2, 3)
    },
    nn.Upsample: functions.interpolation,
    **{getattr(nn, name): functions.elementwise for name in _ELEMENTWISE_MODULES},
}

#: Layers of libraries that `elastic` does not import, by qualified name.
NAMED_MODULES: dict[str, Rule] = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": attention.window_attention,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": attention.window_attention_v2,
    "torchvision.ops.stochastic_depth.StochasticDepth": functions.elementwise,
    "torchvision.ops.misc.Permute": reshaping.permute_module,
    "timm.layers.drop.DropPath": functions.elementwise,
    "timm.layers.norm_act.BatchNormAct2d": batch_norm_and_more,
    **{
        f"timm.layers.std_conv.ScaledStdConv2d{s}": layers.standardised_convolution
        for s in ("", "Same")
    },
    **{f"timm.layers.norm.GroupNorm{one}": layers.group_norm for one in ("", "1")},
    "timm.layers.norm.LayerNorm": layers.layer_norm,
}

FUNCTIONS: dict[Any, Rule] = {
    **{
        function: functions.elementwise
        for home in (torch, F)
        for name in _ELEMENTWISE_NAMES
        if callable(function := getattr(home, name, None))
    },
    **{
        function: functions.arithmetic
        for function in (
            operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow,
            operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne,
            operator.and_, operator.or_,
        )
    },
    **{
        function: functions.passive
        for function in (operator.floordiv, operator.mod, getattr)
    },
    torch._assert: functions.asserted,
    operator.getitem: reshaping.index,
    operator.matmul: functions.matmul,
    torch.matmul: functions.matmul,
    torch.bmm: functions.matmul,
    F.linear: functions.functional_linear,
    F.scaled_dot_product_attention: attention.scaled_dot_product,
    torch.einsum: functions.einsum,
    F.layer_norm: functions.functional_layer_norm,
    F.adaptive_avg_pool2d: functions.pooling(2),
    F.adaptive_max_pool2d: functions.pooling(2),
    F.avg_pool2d: functions.pooling(2),
    F.max_pool2d: functions.pooling(2),
    F.interpolate: functions.interpolation,
    F.pad: functions.padding,
    F.normalize: functions.normalised,
    F.glu: reshaping.gated,
    F.softmax: functions.along,
    torch.softmax: functions.along,
    torch.mean: functions.reduction,
    torch.sum: functions.reduction,
    torch.amax: functions.reduction,
    torch.roll: reshaping.roll,
    torch.swapaxes: reshaping.transpose,
    torch.stack: reshaping.stack,
    torch.split: reshaping.split,
    torch.unbind: reshaping.unbind,
    torch.flatten: reshaping.regroup,
    torch.reshape: reshaping.reshape,
    torch.permute: reshaping.permute,
    torch.transpose: reshaping.transpose,
    torch.unsqueeze: reshaping.unsqueeze,
    torch.squeeze: reshaping.squeeze,
    torch.cat: reshaping.concatenate,
    torch.concat: reshaping.concatenate,
    torch.chunk: reshaping.chunk,
}  # fmt: skip

NAMED_FUNCTIONS: dict[str, Rule] = {
    "torchvision.models.swin_transformer._patch_merging_pad": reshaping.merge_patches,
    "torchvision.ops.stochastic_depth.stochastic_depth": functions.elementwise,
}

METHODS: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE_NAMES, functions.elementwise),
    "size": functions.passive,
    "dim": functions.passive,
    "view": reshaping.reshape,
    "reshape": reshaping.reshape,
    "flatten": reshaping.regroup,
    "permute": reshaping.permute,
    "transpose": reshaping.transpose,
    "swapaxes": reshaping.transpose,
    "split": reshaping.split,
    "unbind": reshaping.unbind,
    "roll": reshaping.roll,
    "norm": functions.p_norm,
    "amax": functions.reduction,
    "unsqueeze": reshaping.unsqueeze,
    "squeeze": reshaping.squeeze,
    "expand": reshaping.expand,
    "expand_as": reshaping.expand_as,
    "repeat": reshaping.repeat,
    "mean": functions.reduction,
    "sum": functions.reduction,
    "softmax": functions.along,
    "chunk": reshaping.chunk,
    "matmul": functions.matmul,
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
