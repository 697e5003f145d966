"""Rules of what takes tensors apart, joins them or gives them another shape."""

from collections.abc import Sequence
from math import prod
from typing import Any

from ..dims import Atom, Dim, constant, length, merge
from .visit import Size, Value, Visit, unknown


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


def stack(visit: Visit) -> Value:
    parts = visit.parts()
    for part in parts[1:]:
        for one, other in zip(parts[0], part, strict=True):
            visit.unify(one, other)
    dim = visit.argument(1, "dim", 0) % len(visit.shape)
    return (*parts[0][:dim], constant(len(parts)), *parts[0][dim:])


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


def _takes_all(part: slice, size: int) -> bool:
    """Whether a slice leaves nothing out, of `size` elements or of fewer."""
    return (
        part.start in (None, 0)
        and part.step in (None, 1)
        and (part.stop is None or (isinstance(part.stop, int) and part.stop >= size))
    )


def roll(visit: Visit) -> Value:
    x, over = visit.x, visit.argument(2, "dims")
    over = range(len(x)) if over is None else [over] if isinstance(over, int) else over
    visit.freeze(tuple(x[place] for place in over), reason="rolls an elastic dimension")
    return x


def merge_patches(visit: Visit) -> Value:
    """Swin's patch merging: the four pixels of a 2 x 2 square side by side."""
    x = visit.x
    visit.freeze(x[:-1], reason="merges patches of an elastic dimension")
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


def expand_as(visit: Visit) -> Value:
    """As long as another tensor, which may shrink."""
    x, other = visit.x, visit.value(visit.argument(1, "other"))
    if not isinstance(other, tuple):
        return unknown(visit)
    lead = len(other) - len(x)
    out: list[Dim] = list(other)
    for place, dim in enumerate(x, start=lead):
        if length(dim) == length(other[place]):
            out[place] = visit.unify(dim, other[place])
    return tuple(out)


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
