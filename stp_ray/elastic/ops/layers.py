"""Rules of layers."""

from math import prod

from ..dims import Atom, constant
from .visit import Size, Value, Visit, spread


def linear(visit: Visit) -> Value:
    x = visit.x
    weight = visit.tensor("weight", None, x[-1])
    out = visit.dims.produced(weight[0], visit.layer)
    visit.tensor("bias", out)
    visit.step.attributes.update(in_features=Size(x[-1]), out_features=Size(out))
    factor, elastic = spread(visit.resolved(x[:-1]))
    visit.macs(factor, *elastic, x[-1], out)
    return (*x[:-1], out)


def convolution(visit: Visit) -> Value:
    x, module = visit.x, visit.module
    if len(x) != module.weight.dim():
        tensors = [visit.tensor(name) for name, _ in module.named_parameters()]
        visit.freeze(x, *tensors, reason="convolution of an input without a batch dimension")
        visit.step.opaque = True
        return visit.constants()
    visit.freeze((x[0], *x[2:]), reason="convolves over an elastic dimension")
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
        reason = f"groups that its pieces do not fit: {visit.source}"
        visit.dims.coarsen(x[1], per_group, reason, unit="groups")
        visit.step.attributes["num_groups"] = Size(x[1], per=per_group)
    return x
