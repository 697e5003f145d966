"""How the lengths of tensor dimensions depend on each other.

While a model is traced, every dimension of every activation and parameter is a `Dim`: a
row of atoms laid end to end. An atom is either a constant number of elements, or a
variable number of units of `factor` elements each. Two layers that must agree are unified;
what cannot be proven to agree is frozen, with a reason. After tracing, the variables that
are still free are the width axes of the search space.

    conv out-channels            [64 x 1]
    query of 12 heads of 64      [12 x 64]
    flatten of 7 x 7 pixels      [512 x 49]
    concatenation of two         [64 x 1][32 x 1]
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import lcm


@dataclass(eq=False)
class Variable:
    """A number of units that may shrink.

    Args:
        size: full number of units.
        producers: layers whose output has this width; only these make it an axis.
        unit: what is counted: "channels", "heads" or "groups".
    """

    size: int
    producers: list[str] = field(default_factory=list)
    unit: str = "channels"


@dataclass(frozen=True)
class Atom:
    """`variable` units of `factor` elements, or `length` elements that never change."""

    length: int
    variable: Variable | None = None
    factor: int = 1


Dim = tuple[Atom, ...]


def constant(length: int) -> Dim:
    """A dimension that never changes."""
    return (Atom(length),)


def length(dim: Dim) -> int:
    """Full length in elements."""
    return sum(atom.length for atom in dim)


@dataclass(frozen=True)
class Frozen:
    """Something that could not be made elastic, and why.

    Args:
        name: the layer.
        size: its full width in channels, heads or groups.
        reason: what stands in the way, with the source line where there is one.
    """

    name: str
    size: int
    reason: str


class Dims:
    """The equations between dimensions, solved by substitution as they come in."""

    def __init__(self) -> None:
        self._substitution: dict[Variable, Dim] = {}
        self._order: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self.frozen: list[Frozen] = []

    def fresh(self, size: int, *, factor: int = 1, unit: str = "channels") -> Dim:
        """A new free dimension of `size` units of `factor` elements each."""
        if size * factor <= 1:
            return constant(size * factor)
        return (Atom(size * factor, Variable(size, unit=unit), factor),)

    def produced(self, dim: Dim, layer: str) -> Dim:
        """Note that `layer` produces this dimension, which makes its variables axes."""
        self._order.setdefault(layer, len(self._order))
        units = (atom.variable.size if atom.variable else atom.length for atom in self.resolve(dim))
        self._sizes.setdefault(layer, sum(units))
        for atom in self.resolve(dim):
            if atom.variable is not None and layer not in atom.variable.producers:
                atom.variable.producers.append(layer)
        return dim

    def size_of(self, layer: str) -> int:
        """The full width of a layer that produces a dimension, in what was counted there."""
        return self._sizes[layer]

    def producers(self, variable: Variable) -> list[str]:
        """The layers that produce a variable, in the order in which they were visited."""
        return sorted(variable.producers, key=self._order.__getitem__)

    def resolve(self, dim: Dim) -> Dim:
        """The dimension in terms of variables that are still free, constants merged."""
        merged: list[Atom] = []
        for atom in self._substituted(dim):
            if merged and atom.variable is None and merged[-1].variable is None:
                merged[-1] = Atom(merged[-1].length + atom.length)
            else:
                merged.append(atom)
        return tuple(merged)

    def _substituted(self, dim: Iterable[Atom]) -> list[Atom]:
        """The atoms in terms of variables that are still free."""
        atoms: list[Atom] = []
        for atom in dim:
            if atom.variable in self._substitution:
                # Kept in its final form: chains of substitutions are not walked again.
                parts = tuple(self._substituted(self._substitution[atom.variable]))
                self._substitution[atom.variable] = parts
                atoms += [
                    Atom(
                        part.length * atom.factor,
                        part.variable,
                        part.factor * atom.factor if part.variable else 1,
                    )
                    for part in parts
                ]
            else:
                atoms.append(atom)
        return atoms

    def is_constant(self, dim: Dim) -> bool:
        return all(atom.variable is None for atom in self.resolve(dim))

    def freeze(self, dims: Iterable[Dim], reason: str, *, report: bool = True) -> None:
        """Make dimensions constant. With `report` the layers that lose their axis are listed."""
        for dim in dims:
            for atom in self.resolve(dim):
                variable = atom.variable
                if variable is None or variable in self._substitution:
                    continue
                self._substitution[variable] = constant(variable.size)
                if report:
                    # A width in pieces, frozen one by one, is one frozen width.
                    lost = [Frozen(name, self._sizes[name], reason) for name in variable.producers]
                    self.frozen += [one for one in lost if one not in self.frozen]

    def unify(self, one: Dim, other: Dim, reason: str) -> Dim:
        """Make two dimensions of equal full length equal; returns the common form.

        What cannot be made equal piece by piece is frozen, `reason` saying where they met.
        """
        if length(one) != length(other):
            raise ValueError(f"lengths {length(one)} and {length(other)} cannot be equal")
        left, right = self._substituted(one), self._substituted(other)
        while left and right:
            a, b = left[0], right[0]
            if a.length == b.length:
                self._equate(a, b, reason)
                left, right = left[1:], right[1:]
            elif a.length > b.length:
                left = [*self._split(a, b.length, reason), *left[1:]]
            else:
                right = [*self._split(b, a.length, reason), *right[1:]]
            left, right = self._substituted(left), self._substituted(right)
        return self.resolve(one)

    def coarsen(self, dim: Dim, factor: int, reason: str, unit: str) -> None:
        """Let the dimension move in steps of `factor` elements only: whole units."""
        total = length(dim)
        if factor > 1 and total % factor == 0:
            self.unify(dim, self.fresh(total // factor, factor=factor, unit=unit), reason)
        elif factor > 1:
            self.freeze([dim], reason)

    def _split(self, atom: Atom, head: int, reason: str) -> tuple[Atom, Atom]:
        """Cut an atom in two after `head` elements."""
        if atom.variable is not None:
            if head % atom.factor:
                self.freeze([(atom,)], reason)
                return Atom(head), Atom(atom.length - head)
            whole, units = atom.variable, head // atom.factor
            parts = [
                Variable(size, list(whole.producers), whole.unit)
                for size in (units, whole.size - units)
            ]
            self._substitution[whole] = tuple(Atom(part.size, part) for part in parts)
            first, second = parts
            return (
                Atom(head, first, atom.factor),
                Atom(atom.length - head, second, atom.factor),
            )
        return Atom(head), Atom(atom.length - head)

    def _equate(self, a: Atom, b: Atom, reason: str) -> None:
        x, y = a.variable, b.variable
        if x is None or y is None:
            self.freeze([(a,), (b,)], reason)
            return
        if x is y:
            return
        step = lcm(a.factor, b.factor)
        if a.length % step:
            self.freeze([(a,), (b,)], reason)
            return
        unit = next((v.unit for v in (x, y) if v.unit != "channels"), "channels")
        producers = list(dict.fromkeys([*x.producers, *y.producers]))
        common = Variable(a.length // step, producers, unit)
        for variable, factor in ((x, a.factor), (y, b.factor)):
            ratio = step // factor
            self._substitution[variable] = (Atom(variable.size, common, ratio),)


def merge(dims: Sequence[Dim]) -> Dim | None:
    """One dimension from several neighbouring ones (row-major), or None if more than one
    of them is elastic. `dims` must be resolved."""
    elastic = [i for i, dim in enumerate(dims) if any(atom.variable for atom in dim)]
    if len(elastic) > 1:
        return None
    lengths = [length(dim) for dim in dims]
    if not elastic:
        return constant(_product(lengths))
    place = elastic[0]
    outer, inner = _product(lengths[:place]), _product(lengths[place + 1 :])
    scaled = tuple(
        Atom(atom.length * inner, atom.variable, atom.factor * inner) for atom in dims[place]
    )
    return scaled * outer


def _product(numbers: Iterable[int]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total
