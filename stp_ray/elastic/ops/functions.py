"""Rules of functions that compute with tensors."""

from collections.abc import Sequence
from typing import Any

import torch

from ..dims import Dim, constant, length
from .visit import Rule, Size, Value, Visit, spread, tensors_in, unknown


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


def arithmetic(visit: Visit) -> Value:
    """+ - * / of tensors (elementwise) or of integers that came from shapes."""
    return elementwise(visit) if isinstance(visit.shape, torch.Size) else None


def passive(visit: Visit) -> Value:
    """Yields no tensor (a shape, a size) or integers computed from one."""
    if isinstance(visit.shape, (torch.Size, list)) and tensors_in(visit.shape):
        return unknown(visit)
    return None


def asserted(visit: Visit) -> Value:
    """An assertion: what it asks of a width has to stay true."""
    condition = visit.argument(0, "condition")
    visit.freeze(tuple(visit.origins(condition)), reason="is asked for by an assertion")
    return None


def interpolation(visit: Visit) -> Value:
    """Works on all dimensions but [N, C]."""
    return _across(visit, len(visit.shape) - 2)


def pooling(dimensions: int) -> Rule:
    """Works on so many of the last dimensions."""
    return lambda visit: _across(visit, dimensions)


def _across(visit: Visit, dimensions: int) -> Value:
    x = visit.x
    first = len(visit.shape) - dimensions
    changed = [
        place
        for place, size in enumerate(visit.shape)
        if length(x[place]) != size or place >= first
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


def p_norm(visit: Visit) -> Value:
    """x.norm(p, dim, keepdim)."""
    return _reduced(visit, visit.argument(2, "dim"))


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


def functional_linear(visit: Visit) -> Value:
    x, weight = (visit.value(visit.argument(i, n)) for i, n in enumerate(("input", "weight")))
    bias = visit.value(visit.argument(2, "bias"))
    if weight is None or len(weight) != 2:
        return unknown(visit)
    visit.unify(x[-1], weight[1])
    out = visit.dims.produced(weight[0], visit.layer)
    if bias is not None:
        visit.unify(bias[0], out)
    factor, elastic = spread(visit.resolved(x[:-1]))
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
        factor, elastic = spread(visit.resolved(a[:-1]))
        visit.macs(factor, *elastic, a[-1], b[-1])
        return (*a[:-1], b[-1])
    shared = []
    for one, other in zip(a[:-2], b[:-2], strict=True):
        if length(one) == length(other):
            visit.unify(one, other)
        shared.append(one if length(one) >= length(other) else other)
    factor, elastic = spread(visit.resolved([*shared, a[-2], b[-1]]))
    visit.macs(factor, *elastic, a[-1])
    return (*shared, a[-2], b[-1])


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
    if any(length(dims[letter]) > 1 for letter in summed):  # else torch multiplies by elements
        factor, elastic = spread(visit.resolved(dims.values()))
        visit.macs(factor, *elastic)
    return tuple(dims[letter] for letter in result)
