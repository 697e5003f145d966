"""The multi-dimension architecture space: axes, blocks, and ways to draw from them.

Names and integers only. Every draw is canonical (an axis that lies wholly inside dropped
blocks sits at its floor, and a block inside of one is dropped, so that equal networks are equal
subnets), and every draw that is given a budget keeps it.
"""

import random
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from math import prod

import numpy as np

from ..errors import BudgetError
from .cost import SECOND, Budget, Cost, CostTable, Term
from .show import folded, table
from .subnet import Subnet


@dataclass(frozen=True)
class WidthAxis:
    """One width that can shrink.

    Args:
        name: the layer that produces it first, in dotted notation.
        size: its full width, in `unit`.
        choices: admissible widths, ascending, the last one being `size`.
        unit: "channels", "heads" or "groups".
        layers: every layer whose output moves together with it.
    """

    name: str
    size: int
    choices: tuple[int, ...]
    unit: str = "channels"
    layers: tuple[str, ...] = ()

    def nearest(self, width: float) -> int:
        """The admissible width nearest to `width`, the smaller one of two."""
        return min(self.choices, key=lambda choice: (abs(choice - width), choice))


@dataclass(frozen=True)
class ResidualBlock:
    """A residual branch that can be left out.

    Args:
        name: the module that holds it, in dotted notation.
        axes: the axes that live only inside it.
        layers: the layers that go with it, in the order in which they run.
        within: the blocks that it lies in, and goes with.
    """

    name: str
    axes: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    within: tuple[str, ...] = ()


#: Places of the exponents that are tried at once when a draw is fitted to a budget.
_GRID = np.linspace(0, 1, 16)


class SearchSpace:
    """All subnets of one supernet, with their prices. Immutable.

    Attributes:
        terms: the terms of the MACs, one for each layer that has any.

    Args:
        axes: the widths that can shrink.
        blocks: the residual blocks that can be dropped.
        macs: terms of the MACs of one sample.
        params: terms of the number of parameters.
        latency: terms of the latency of one sample in femtoseconds, where they were measured;
            see `timed`.
    """

    #: Upper end of the rate at which a random subnet drops blocks [ours].
    MAX_DROP_RATE = 0.5

    def __init__(
        self,
        axes: Sequence[WidthAxis],
        blocks: Sequence[ResidualBlock],
        macs: Iterable[Term],
        params: Iterable[Term],
        latency: Iterable[Term] | None = None,
    ) -> None:
        self.axes = tuple(axes)
        self.blocks = tuple(blocks)
        self._axis = {axis.name: axis for axis in self.axes}
        self._homes: dict[str, frozenset[str]] = {
            axis.name: frozenset(b.name for b in self.blocks if axis.name in b.axes)
            for axis in self.axes
        }
        self._within = {b.name: frozenset(b.within) for b in self.blocks if b.within}
        self.terms = tuple(macs)
        self._params = tuple(params)
        self._timed = latency is not None
        self._table = CostTable(
            self._axis, (b.name for b in self.blocks), self.terms, self._params, latency or ()
        )
        self._fixed_macs = sum(
            term.coefficient * prod(extent.constant for extent in term.extents)
            for term in self.terms
            if not term.gates and not any(extent.parts for extent in term.extents)
        )

    def __repr__(self) -> str:
        full, least = self.cost(self.full), self.cost(self.smallest)
        return (
            f"SearchSpace({len(self.axes)} axes, {len(self.blocks)} droppable blocks, "
            f"{least.macs:,} to {full.macs:,} MACs)"
        )

    def _repr_html_(self) -> str:
        ends = [("main network", self.cost()), ("smallest subnet", self.cost(self.smallest))]
        costs = table(
            ("", "MACs of one sample", "parameters"),
            [(name, cost.macs, cost.params) for name, cost in ends],
            caption=f"{len(self.axes)} axes, {len(self.blocks)} blocks that can be dropped",
        )
        axes = table(
            ("axis", "unit", "smallest", "full", "choices"),
            [(a.name, a.unit, a.choices[0], a.size, len(a.choices)) for a in self.axes],
        )
        blocks = table(("block", "layers"), [(b.name, len(b.layers)) for b in self.blocks])
        return costs + folded("axes", axes) + folded("blocks", blocks)

    @cached_property
    def full(self) -> Subnet:
        """The main network."""
        return Subnet({axis.name: axis.size for axis in self.axes})

    @cached_property
    def smallest(self) -> Subnet:
        """Every axis at its floor, every block dropped."""
        return Subnet(
            {axis.name: axis.choices[0] for axis in self.axes},
            [block.name for block in self.blocks],
        )

    # -- prices ---------------------------------------------------------------------

    def timed(self, latency: Iterable[Term]) -> "SearchSpace":
        """The same space with prices that hold an estimated latency, so that budgets may bound it
        [ours].

        Args:
            latency: its terms in femtoseconds, as `latency.fit` finds them.

        Raises:
            KeyError: a term is of an axis that is not here.
            ValueError: what the terms add up to cannot be counted in 64 bits.
        """
        latency = tuple(latency)
        widths = self.full.widths
        total = sum(t.coefficient * prod(e.at(widths) for e in t.extents) for t in latency)
        if not 0 <= total < 2**63:
            raise ValueError(
                f"latency terms add up to {total / SECOND:.3g} s for the main network; expected 0 "
                f"to {2**63 // SECOND:,} s; their coefficients are femtoseconds"
            )
        return SearchSpace(self.axes, self.blocks, self.terms, self._params, latency)

    @property
    def elastic_share(self) -> float:
        """Share of the main network's MACs that some width or block can change, in [0, 1]."""
        full = self.cost().macs
        return 1 - self._fixed_macs / full if full else 0.0

    def cost(self, subnet: Subnet | None = None) -> Cost:
        """The price of one subnet (of the main network without one). Touches no tensor. Raises
        ValueError for a subnet of another space."""
        if subnet is None:
            return self._full_cost
        self.validate(subnet)
        return self.costs([subnet])[0]

    @cached_property
    def _full_cost(self) -> Cost:
        return self.costs([self.full])[0]

    @cached_property
    def _least_cost(self) -> Cost:
        return self.costs([self.smallest])[0]

    def costs(self, subnets: Sequence[Subnet]) -> list[Cost]:
        """The prices of many subnets at once."""
        widths = np.array(
            [[s.widths[axis.name] for axis in self.axes] for s in subnets], dtype=np.int64
        ).reshape(len(subnets), len(self.axes))
        dropped = np.array(
            [[b.name in s.dropped for b in self.blocks] for s in subnets], dtype=np.int64
        ).reshape(len(subnets), len(self.blocks))
        macs, params = self._table.price(widths, dropped)
        seconds = self._table.seconds(widths, dropped).tolist() if self._timed else repeat(None)
        return [Cost(int(m), int(p), s) for m, p, s in zip(macs, params, seconds, strict=False)]

    def admits(self, subnet: Subnet, budget: Budget) -> bool:
        """Whether the subnet keeps the budget.

        Raises:
            ValueError: the budget bounds latency, and this space has no terms of it.
        """
        return budget.admits(self.cost(subnet), of=self.cost())

    def require(self, budget: Budget) -> None:
        """Raise BudgetError if not even the smallest subnet keeps the budget; ValueError if it
        bounds latency and this space has no terms of it, or is no `Budget`."""
        _require_budget(budget)
        least, full = self._least_cost, self._full_cost
        if not budget.admits(least, of=full):
            seconds = ""
            if least.latency_s is not None and full.latency_s:
                seconds = (
                    f" and about {1e3 * least.latency_s:.3g} ms "
                    f"({least.latency_s / full.latency_s:.4f})"
                )
            macs, params = least.macs / max(full.macs, 1), least.params / max(full.params, 1)
            raise BudgetError(
                f"no subnet keeps the budget {budget.label}: the cheapest one costs {least.macs:,} "
                f"MACs ({macs:.4f} of the full network) and {least.params:,} params "
                f"({params:.4f}){seconds}; raise the budget, or lower space.divisor or "
                "space.min_ratio"
            )

    def validate(self, subnet: Subnet) -> None:
        """Raise ValueError if the subnet does not belong to this space, or is none."""
        if not isinstance(subnet, Subnet):
            raise ValueError(f"subnet is {subnet!r:.60}; expected a Subnet, such as space.smallest")
        if set(subnet.widths) != set(self._axis):
            odd = sorted(set(subnet.widths) ^ set(self._axis))
            raise ValueError(f"subnet {subnet.id} names other axes than this space: {odd[:3]}")
        for name, width in subnet.widths.items():
            if width not in self._axis[name].choices:
                raise ValueError(f"width {width} of {name} is not among {self._axis[name].choices}")
        unknown = subnet.dropped - {block.name for block in self.blocks}
        if unknown:
            raise ValueError(f"subnet drops unknown blocks: {sorted(unknown)[:3]}")

    # -- draws ----------------------------------------------------------------------

    def uniform(self, ratio: float) -> Subnet:
        """Every width at this ratio of its full width, all blocks kept. Raises ValueError for a
        ratio outside of [0, 1]."""
        _require_share("ratio", ratio)
        return Subnet({axis.name: axis.nearest(ratio * axis.size) for axis in self.axes})

    def uniform_within(self, budget: Budget) -> Subnet:
        """The largest uniform-width subnet that keeps the budget; blocks are dropped from
        the end only if even the smallest widths are too many [ours].

        Raises BudgetError if no subnet keeps the budget.
        """
        self.require(budget)
        candidates = [self.uniform(step / 200) for step in range(201)]
        for count in range(1, len(self.blocks) + 1):
            dropped = [block.name for block in self.blocks[-count:]]
            candidates.append(Subnet(self.smallest.widths, dropped))
        full = self.cost()
        fitting = [
            (cost.macs, cost.params, -len(candidate.dropped), i)
            for i, (candidate, cost) in enumerate(
                zip(candidates, self.costs(candidates), strict=True)
            )
            if budget.admits(cost, of=full)
        ]
        return self.canonical(candidates[max(fitting)[-1]])

    def fill(self, subnet: Subnet, budget: Budget) -> Subnet:
        """A subnet with what it leaves of a budget used: one axis after another becomes a step
        wider, always the one with the smallest share of its full width that still can, until none
        can [ours]. No block comes back. What does not keep the budget is returned as it is. Raises
        ValueError for a subnet of another space, or what is no `Budget`."""
        self.validate(subnet)
        _require_budget(budget)
        limits = budget.limits(self._full_cost)
        full, flags = self._ends[1][0], self._flags(subnet.dropped)
        alive = [not self._homes[axis.name] & subnet.dropped for axis in self.axes]
        lives = np.array(alive, dtype=bool)
        row = np.array([subnet.widths[axis.name] for axis in self.axes], dtype=np.int64)
        while True:
            growing = np.flatnonzero(lives & (row < full))
            wider = np.repeat(row[None], len(growing), axis=0)
            for grown, place in zip(wider, growing.tolist(), strict=True):
                grown[place] = self._next(place, grown[place], +1)
            fits = np.flatnonzero(self._table.fits(wider, flags, limits))
            if not len(fits):
                return self._subnet(row, subnet.dropped)
            row = wider[fits[np.argmin((row / full)[growing[fits]])]]

    def sample(self, rng: random.Random, budget: Budget | None = None) -> Subnet:
        """A random subnet, drawn from `rng`; with a budget, one that keeps it and comes near to it
        [ours].

        Each axis draws u in [0, 1) for the place of its width among its choices, and each
        block is dropped at a rate drawn once. With a budget, u becomes u ** g with the
        smallest g (the widest subnet) that keeps it.

        Raises BudgetError if no subnet keeps the budget; ValueError if `rng` is no `random.Random`.
        """
        _require_random(rng)
        rate = rng.uniform(0, self.MAX_DROP_RATE)
        dropped = [block.name for block in self.blocks if rng.random() < rate]
        places = np.array([rng.random() for _ in self.axes])
        if budget is None:
            return self._at(places, dropped)
        self.require(budget)
        limits = budget.limits(self._full_cost)
        floor, full = self._ends
        kept = [block.name for block in self.blocks if block.name not in dropped]
        rng.shuffle(kept)
        while not self._table.fits(floor, self._flags(dropped), limits)[0]:
            dropped.append(kept.pop())
        rng.shuffle(dropped)
        while (
            dropped
            and self._table.fits(full, self._flags(dropped), limits)[0]
            and self._table.fits(floor, self._flags(dropped[:-1]), limits)[0]
        ):
            dropped.pop()  # even the full widths of the other blocks would leave budget unused
        low, high = 1e-3, 1e3
        drawn, flags = floor[0], self._flags(dropped)
        for _ in range(3):  # a grid, refined twice: about 1 % of the exponent
            exponents = low * (high / low) ** _GRID
            widths = self._widths_at(places ** exponents[:, None])
            fits = self._table.fits(widths, flags, limits)
            if not fits.any():
                break
            first = int(np.argmax(fits))
            drawn = widths[first]
            low, high = exponents[max(first - 1, 0)], exponents[first]
        return self._subnet(drawn, dropped)

    def mutate(
        self, subnet: Subnet, rng: random.Random, p: float, budget: Budget | None = None
    ) -> Subnet:
        """Change each axis and each block of a subnet with probability p [ours].

        An axis moves by one or two choices half of the time and anywhere otherwise. With a
        budget the result is brought back under it, and close to it, by single steps. `rng`
        alone decides. Raises BudgetError if no subnet keeps the budget, ValueError if p is no
        probability, `rng` no `random.Random` or the subnet of another space.
        """
        _require_random(rng)
        _require_share("p", p)
        self.validate(subnet)
        widths, dropped = dict(subnet.widths), set(subnet.dropped)
        for block in self.blocks:
            if rng.random() < p:
                dropped ^= {block.name}
                if block.name not in dropped:
                    for name in block.axes:
                        widths[name] = rng.choice(self._axis[name].choices)
        for axis in self.axes:
            if rng.random() < p:
                place = axis.choices.index(widths[axis.name])
                step = rng.choice((-2, -1, 1, 2))
                near = axis.choices[min(max(place + step, 0), len(axis.choices) - 1)]
                widths[axis.name] = near if rng.random() < 0.5 else rng.choice(axis.choices)
        return self._settle(widths, dropped, rng, budget)

    def crossover(
        self, one: Subnet, other: Subnet, rng: random.Random, budget: Budget | None = None
    ) -> Subnet:
        """Each block, with the axes inside it, and each other axis comes from `one` or from
        `other`, as `rng` decides [ours]. A budget is kept as by `mutate`.

        Raises BudgetError if no subnet keeps the budget, ValueError for a subnet of another
        space or an `rng` that is no `random.Random`.
        """
        _require_random(rng)
        self.validate(one)
        self.validate(other)
        widths: dict[str, int] = {}
        dropped: set[str] = set()
        source = {block.name: rng.choice((one, other)) for block in self.blocks}
        for block in self.blocks:
            dropped |= source[block.name].dropped & {block.name}
        for axis in self.axes:
            homes = sorted(self._homes[axis.name])
            parent = source[homes[0]] if homes else rng.choice((one, other))
            widths[axis.name] = parent.widths[axis.name]
        return self._settle(widths, dropped, rng, budget)

    def expand(self, subnet: Subnet, rng: random.Random, p: float) -> Subnet:
        """A mutation upwards, subnet within result within full: subnet mutating expansion [paper].

        Each axis moves, with probability p, to a random width between its own and the full one;
        each dropped block comes back with probability p, if those that it lies in do; `rng` draws
        [ours]. Raises ValueError if p is no probability, `rng` no `random.Random` or the subnet of
        another space.
        """
        _require_random(rng)
        _require_share("p", p)
        self.validate(subnet)
        stay = {name for name in sorted(subnet.dropped) if rng.random() >= p}
        dropped = self._with_inner(stay) & subnet.dropped
        widths = {}
        for axis in self.axes:
            width = subnet.widths[axis.name]
            if rng.random() < p:
                wider = rng.choice([choice for choice in axis.choices if choice >= width])
                inside = self._homes[axis.name] & dropped  # where no width is used
                width = width if inside else wider
            widths[axis.name] = width
        return Subnet(widths, dropped)

    def canonical(self, subnet: Subnet) -> Subnet:
        """The same network as `subnet`, with axes that lie wholly inside dropped blocks at their
        floor, and blocks inside of them dropped."""
        dropped = self._with_inner(subnet.dropped)
        dead = {name for name, homes in self._homes.items() if homes & dropped}
        if not dead and dropped == subnet.dropped:
            return subnet
        return Subnet(
            {
                name: self._axis[name].choices[0] if name in dead else width
                for name, width in subnet.widths.items()
            },
            dropped,
        )

    # -- internals ------------------------------------------------------------------

    def _with_inner(self, dropped: Set[str]) -> Set[str]:
        """Blocks, and those that lie in one of them."""
        return dropped | {name for name, outer in self._within.items() if outer & dropped}

    @cached_property
    def _choices(self) -> tuple[np.ndarray, np.ndarray]:
        """Widths to choose from, [axes, most], and how many there are, [axes]."""
        counts = np.array([len(axis.choices) for axis in self.axes], dtype=np.int64)
        table = np.zeros((len(self.axes), int(counts.max(initial=1))), dtype=np.int64)
        for row, axis in zip(table, self.axes, strict=True):
            row[: len(axis.choices)] = axis.choices
        return table, counts

    def _widths_at(self, places: np.ndarray) -> np.ndarray:
        """Widths [..., axes] for places in [0, 1] [..., axes] among each axis's choices."""
        table, counts = self._choices
        index = np.minimum((places * counts).astype(np.int64), counts - 1)
        return table[np.arange(len(counts)), index]

    def _at(self, places: np.ndarray, dropped: Iterable[str]) -> Subnet:
        return self._subnet(self._widths_at(places), dropped)

    def _subnet(self, widths: np.ndarray, dropped: Iterable[str]) -> Subnet:
        named: Mapping[str, int] = {
            a.name: width for a, width in zip(self.axes, widths.tolist(), strict=True)
        }
        return self.canonical(Subnet(named, dropped))

    @cached_property
    def _ends(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the full widths, each [1, axes]."""
        ends = [[axis.choices[0] for axis in self.axes], [axis.size for axis in self.axes]]
        smallest, full = (np.array([widths], dtype=np.int64) for widths in ends)
        return smallest, full

    def _flags(self, dropped: Iterable[str]) -> np.ndarray:
        """1 for each block that is dropped; int64 [1, blocks]."""
        gone = set(dropped)
        return np.array([[block.name in gone for block in self.blocks]], dtype=np.int64)

    def _settle(
        self,
        widths: dict[str, int],
        dropped: set[str],
        rng: random.Random,
        budget: Budget | None,
    ) -> Subnet:
        if budget is None:
            return self.canonical(Subnet(widths, dropped))
        self.require(budget)
        limits = budget.limits(self._full_cost)
        # One row that is changed in place: a subnet for each step would take longer than its price.
        row = np.array([[widths[axis.name] for axis in self.axes]], dtype=np.int64)
        flags = self._flags(dropped)
        while not self._table.fits(row, flags, limits)[0]:
            shrinkable = np.flatnonzero(row[0] > self._ends[0][0])
            if len(shrinkable):
                place = rng.choice(shrinkable)
                row[0, place] = self._next(place, row[0, place], -1)
            else:
                kept = [block.name for block in self.blocks if block.name not in dropped]
                dropped.add(rng.choice(kept))
                flags = self._flags(dropped)
        # One pass over the axes in random order, each one step up where the budget allows.
        for place in rng.sample(range(len(self.axes)), len(self.axes)):
            axis, before = self.axes[place], row[0, place]
            if before < axis.size and not self._homes[axis.name] & dropped:
                row[0, place] = self._next(place, before, +1)
                if not self._table.fits(row, flags, limits)[0]:
                    row[0, place] = before
        return self._subnet(row[0], dropped)

    def _next(self, place: int, width: int, step: int) -> int:
        """The width so many steps further among an axis's choices."""
        choices = self.axes[place].choices
        return choices[choices.index(width) + step]


def _require_budget(budget: Budget) -> None:
    if not isinstance(budget, Budget):
        raise ValueError(f"budget is {budget!r}; expected a Budget, such as Budget(macs=0.15)")


def _require_random(rng: random.Random) -> None:
    if not isinstance(rng, random.Random):
        raise ValueError(f"rng is {rng!r:.60}; expected a random.Random(seed)")


def _require_share(name: str, value: float) -> None:
    if not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}; expected a number in [0, 1]")
