"""What a subnet costs, by integer arithmetic over a table that tracing fills once.

A term of the table is `coefficient * extent * extent ...`; an extent is a linear form
in the axis widths (a layer's input or output size); a term counts only while none of
the residual blocks it lies in is dropped. The table is exact: MACs are those of
convolutions, linear layers and attention products for one sample. A latency, where terms
for it were measured (`latency.py`), is priced in the same way: an estimate.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np

from .show import table

#: Femtoseconds in a second: the unit of latency terms, fine enough for a single MAC of a GPU.
SECOND = 10**15


@dataclass(frozen=True)
class Cost:
    """What one network costs."""

    macs: int
    """Multiply-accumulates for one sample, of convolutions, linear layers and attention."""
    params: int
    """Number of parameters."""
    latency_s: float | None = None
    """Seconds of a forward pass of one sample, where it was measured or a table estimates it."""

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [("MACs of one sample", self.macs)]
        rows.append(("parameters", self.params))
        if self.latency_s is not None:
            rows.append(("latency, ms", f"{1e3 * self.latency_s:.2f}"))
        return table(("cost", ""), rows)


@dataclass(frozen=True)
class Budget:
    """An upper bound on cost. Of macs and params a float is a fraction of the full network, an int
    absolute; latency is always a fraction, latency_ms always absolute.

    Raises ValueError when nothing is bounded or a bound is out of range.
    """

    macs: int | float | None = None
    """Most multiply-accumulates for one sample; None for no bound."""
    params: int | float | None = None
    """Most parameters; None for no bound."""
    latency: float | None = None
    """Longest forward pass of one sample, as a fraction of the full network's in (0, 1], on the
    device that it is measured on; None for no bound."""
    latency_ms: float | None = None
    """Longest forward pass of one sample in milliseconds, instead of `latency`; None for no
    bound."""

    def __post_init__(self) -> None:
        bounds = {field.name: getattr(self, field.name) for field in fields(self)}
        if all(bound is None for bound in bounds.values()):
            raise ValueError("a budget bounds nothing; set macs or params, latency or latency_ms")
        for name, bound in bounds.items():
            if bound is not None and not _in_range(name, bound):
                raise ValueError(f"budget {name}={bound!r}: expected {_EXPECTED[name]}")
        if self.latency is not None and self.latency_ms is not None:
            raise ValueError(
                f"budget latency={self.latency!r} and latency_ms={self.latency_ms!r}: expected one "
                "of them; leave the other out"
            )

    @property
    def timed(self) -> bool:
        """Whether it bounds latency, so that prices have to hold one."""
        return self.latency is not None or self.latency_ms is not None

    @property
    def counted(self) -> "Budget | None":
        """The bounds that arithmetic alone can judge; None where there are none."""
        if self.macs is None and self.params is None:
            return None
        return Budget(self.macs, self.params)

    def limits(self, of: Cost) -> tuple[float, float, float]:
        """The absolute bounds (macs, params, seconds of latency) for a full network that costs
        `of`; infinite where nothing is bounded.

        Raises:
            ValueError: the latency is bounded by a fraction of one that `of` does not hold.
        """
        seconds = float("inf")
        if self.latency_ms is not None:
            seconds = self.latency_ms / 1e3
        elif self.latency is not None:
            seconds = self.latency * _known(of, self)
        return _absolute(self.macs, of.macs), _absolute(self.params, of.params), seconds

    def admits(self, cost: Cost, of: Cost) -> bool:
        """Whether `cost` is within the budget of a full network that costs `of`.

        Raises:
            ValueError: the latency is bounded and a cost does not hold one.
        """
        macs, params, seconds = self.limits(of)
        kept = cost.macs <= macs and cost.params <= params
        return kept and (not self.timed or _known(cost, self) <= seconds)

    def use(self, cost: Cost, of: Cost) -> float:
        """How much of the budget, of a full network that costs `of`, `cost` takes: the largest of
        its shares of a bound [ours].

        Raises:
            ValueError: the latency is bounded and a cost does not hold one.
        """
        macs, params, seconds = self.limits(of)
        shares = [cost.macs / macs, cost.params / params]
        if self.timed:
            shares.append(_known(cost, self) / seconds)
        return max(shares)

    @property
    def label(self) -> str:
        """A short name, used in artifact folders: "0.15", "params-0.3", "macs-1000",
        "latency-0.3", "latency-2.5ms"."""
        parts = []
        if self.macs is not None:
            shown = _shown(self.macs)
            parts.append(shown if isinstance(self.macs, float) else f"macs-{shown}")
        if self.params is not None:
            parts.append(f"params-{_shown(self.params)}")
        if self.latency is not None:
            parts.append(f"latency-{_shown(self.latency)}")
        if self.latency_ms is not None:
            parts.append(f"latency-{_shown(float(self.latency_ms))}ms")
        return "-".join(parts)


_NUMBER = "a fraction in (0, 1] as a float, or an absolute positive int"
_EXPECTED = {
    "macs": _NUMBER,
    "params": _NUMBER,
    "latency": "a fraction in (0, 1] as a float; latency_ms takes milliseconds",
    "latency_ms": "a positive number of milliseconds; latency takes a fraction",
}


def _in_range(name: str, bound: object) -> bool:
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0:
        return False
    if name == "latency_ms":
        return math.isfinite(bound)
    return bound <= 1 if isinstance(bound, float) else name != "latency"


def _known(cost: Cost, budget: Budget) -> float:
    if cost.latency_s is None:
        raise ValueError(
            f"the budget {budget.label} bounds latency, which this cost does not hold; expected "
            "a measured or an estimated one; price it in a space with a table: space.timed(terms)"
        )
    return cost.latency_s


def _shown(bound: int | float) -> str:
    """A bound as short as it can be without being taken for another one."""
    short = f"{bound:g}"
    shown = short if isinstance(bound, float) and float(short) == bound else str(bound)
    return shown.replace("e+", "e")  # folders are named after it


def _absolute(bound: int | float | None, full: int) -> float:
    if bound is None:
        return float("inf")
    return bound * full if isinstance(bound, float) else bound


@dataclass(frozen=True)
class Extent:
    """`constant + sum(coefficient * width of axis)`: the length of one tensor dimension; in a
    latency, what a device makes of it: the next `multiple`."""

    constant: int
    parts: tuple[tuple[str, int], ...] = ()
    multiple: int = 1

    def at(self, widths: Mapping[str, int]) -> int:
        length = self.constant + sum(factor * widths[axis] for axis, factor in self.parts)
        return -(-length // self.multiple) * self.multiple


@dataclass(frozen=True)
class Term:
    """One layer's share of the cost; `gates` are the blocks whose dropping removes it. Terms of
    latency count femtoseconds."""

    coefficient: int
    extents: tuple[Extent, ...]
    gates: frozenset[str] = frozenset()


class CostTable:
    """Prices subnets given as integer arrays, many at once.

    Args:
        axes: axis names, in the order of the columns of `widths`.
        blocks: block names, in the order of the columns of `dropped`.
        macs: terms of the MACs of one sample.
        params: terms of the number of parameters.
        latency: terms of the latency of one sample, in femtoseconds.
    """

    def __init__(
        self,
        axes: Iterable[str],
        blocks: Iterable[str],
        macs: Iterable[Term],
        params: Iterable[Term],
        latency: Iterable[Term] = (),
    ) -> None:
        self._axis = {name: i for i, name in enumerate(axes)}
        self._block = {name: i for i, name in enumerate(blocks)}
        self._extents: dict[Extent, int] = {Extent(1): 0}
        self._macs = self._compile(macs)
        self._params = self._compile(params)
        self._latency = self._compile(latency)
        self._matrix = np.zeros((len(self._axis), len(self._extents)), dtype=np.int64)
        self._constant = np.zeros(len(self._extents), dtype=np.int64)
        self._multiple = np.array([extent.multiple for extent in self._extents], dtype=np.int64)
        self._rounded = bool((self._multiple > 1).any())
        for extent, column in self._extents.items():
            self._constant[column] = extent.constant
            for axis, factor in extent.parts:
                self._matrix[self._axis[axis], column] += factor

    def _compile(self, terms: Iterable[Term]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Merge equal terms; returns coefficients [T], extent columns [T, F], gates [B, T]."""
        merged: dict[tuple[tuple[int, ...], frozenset[str]], int] = {}
        for term in terms:
            columns = tuple(
                sorted(self._extents.setdefault(e, len(self._extents)) for e in term.extents)
            )
            key = (columns, term.gates)
            merged[key] = merged.get(key, 0) + term.coefficient
        depth = max((len(columns) for columns, _ in merged), default=0)
        coefficients = np.array(list(merged.values()), dtype=np.int64)
        factors = np.zeros((len(merged), depth), dtype=np.int64)
        gates = np.zeros((len(self._block), len(merged)), dtype=np.int64)
        for row, (columns, blocks) in enumerate(merged):
            factors[row, : len(columns)] = columns
            for block in blocks:
                gates[self._block[block], row] = 1
        return coefficients, factors, gates

    def price(self, widths: np.ndarray, dropped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """MACs and parameters of N subnets.

        Args:
            widths: int64 [N, axes].
            dropped: 0 or 1, int64 [N, blocks], or [1, blocks] for all rows.

        Returns:
            Two int64 arrays [N]: MACs of one sample, parameters.
        """
        extents = self._at(widths)
        return self._sum(extents, dropped, self._macs), self._sum(extents, dropped, self._params)

    def seconds(self, widths: np.ndarray, dropped: np.ndarray) -> np.ndarray:
        """Estimated latency of N subnets; float64 [N]. Arguments as for `price`."""
        return self._seconds(self._at(widths), dropped)

    def fits(
        self, widths: np.ndarray, dropped: np.ndarray, limits: tuple[float, float, float]
    ) -> np.ndarray:
        """Which of N subnets keep limits of MACs, parameters and seconds; bool [N]. Arguments as
        for `price`; what is not limited is not priced."""
        extents = self._at(widths)
        within = np.ones(len(widths), dtype=bool)
        for terms, most in zip((self._macs, self._params), limits[:2], strict=True):
            if most != float("inf"):
                within &= self._sum(extents, dropped, terms) <= most
        if limits[2] != float("inf"):
            within &= self._seconds(extents, dropped) <= limits[2]
        return within

    def _at(self, widths: np.ndarray) -> np.ndarray:
        extents = widths @ self._matrix + self._constant
        return -(-extents // self._multiple) * self._multiple if self._rounded else extents

    def _seconds(self, extents: np.ndarray, dropped: np.ndarray) -> np.ndarray:
        # Divided at the end alone: a sum of integers is the same in any order.
        return self._sum(extents, dropped, self._latency) / SECOND

    @staticmethod
    def _sum(
        extents: np.ndarray,
        dropped: np.ndarray,
        terms: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> np.ndarray:
        coefficients, factors, gates = terms
        products = coefficients * (dropped @ gates == 0)
        for column in factors.T:
            products = products * extents[:, column]
        return products.sum(axis=1)
