"""What a subnet costs, by integer arithmetic over a table that tracing fills once.

A term of the table is `coefficient * extent * extent ...`; an extent is a linear form
in the axis widths (a layer's input or output size); a term counts only while none of
the residual blocks it lies in is dropped. The table is exact: MACs are those of
convolutions, linear layers and attention products for one sample.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .show import table


@dataclass(frozen=True)
class Cost:
    """What one network costs."""

    macs: int
    """Multiply-accumulates for one sample, of convolutions, linear layers and attention."""
    params: int
    """Number of parameters."""
    latency_s: float | None = None
    """Seconds of a forward pass, where it was measured."""

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [("MACs of one sample", self.macs)]
        rows.append(("parameters", self.params))
        if self.latency_s is not None:
            rows.append(("latency, ms", f"{1e3 * self.latency_s:.2f}"))
        return table(("cost", ""), rows)


@dataclass(frozen=True)
class Budget:
    """An upper bound on cost: a float is a fraction of the full network, an int absolute.

    Raises ValueError when nothing is bounded or a bound is out of range.
    """

    macs: int | float | None = None
    """Most multiply-accumulates for one sample; None for no bound."""
    params: int | float | None = None
    """Most parameters; None for no bound."""

    def __post_init__(self) -> None:
        if self.macs is None and self.params is None:
            raise ValueError("a budget bounds nothing; set macs or params")
        for name, bound in (("macs", self.macs), ("params", self.params)):
            if bound is None:
                continue
            fraction = isinstance(bound, float)
            if isinstance(bound, bool) or not bound > 0 or (fraction and bound > 1):
                raise ValueError(
                    f"budget {name}={bound!r}: expected a fraction in (0, 1] as a float, "
                    "or an absolute positive int"
                )

    def limits(self, of: Cost) -> tuple[float, float]:
        """The absolute bounds (macs, params) for a full network that costs `of`."""
        return _absolute(self.macs, of.macs), _absolute(self.params, of.params)

    def admits(self, cost: Cost, of: Cost) -> bool:
        """Whether `cost` is within the budget of a full network that costs `of`."""
        macs, params = self.limits(of)
        return cost.macs <= macs and cost.params <= params

    @property
    def label(self) -> str:
        """A short name, used in artifact folders: "0.15", "params-0.3", "macs-1000"."""
        parts = []
        if self.macs is not None:
            shown = _shown(self.macs)
            parts.append(shown if isinstance(self.macs, float) else f"macs-{shown}")
        if self.params is not None:
            parts.append(f"params-{_shown(self.params)}")
        return "-".join(parts)


def _shown(bound: int | float) -> str:
    """A bound as short as it can be without being taken for another one."""
    short = f"{bound:g}"
    return short if isinstance(bound, float) and float(short) == bound else str(bound)


def _absolute(bound: int | float | None, full: int) -> float:
    if bound is None:
        return float("inf")
    return bound * full if isinstance(bound, float) else bound


@dataclass(frozen=True)
class Extent:
    """`constant + sum(coefficient * width of axis)`: the length of one tensor dimension."""

    constant: int
    parts: tuple[tuple[str, int], ...] = ()

    def at(self, widths: Mapping[str, int]) -> int:
        return self.constant + sum(factor * widths[axis] for axis, factor in self.parts)


@dataclass(frozen=True)
class Term:
    """One layer's share of the cost; `gates` are the blocks whose dropping removes it."""

    coefficient: int
    extents: tuple[Extent, ...]
    gates: frozenset[str] = frozenset()


class CostTable:
    """Prices subnets given as integer arrays, many at once.

    Args:
        axes: axis names, in the order of the columns of `widths`.
        blocks: block names, in the order of the columns of `dropped`.
    """

    def __init__(
        self,
        axes: Iterable[str],
        blocks: Iterable[str],
        macs: Iterable[Term],
        params: Iterable[Term],
    ) -> None:
        self._axis = {name: i for i, name in enumerate(axes)}
        self._block = {name: i for i, name in enumerate(blocks)}
        self._extents: dict[Extent, int] = {Extent(1): 0}
        self._macs = self._compile(macs)
        self._params = self._compile(params)
        self._matrix = np.zeros((len(self._axis), len(self._extents)), dtype=np.int64)
        self._constant = np.zeros(len(self._extents), dtype=np.int64)
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
        extents = widths @ self._matrix + self._constant
        return self._sum(extents, dropped, self._macs), self._sum(extents, dropped, self._params)

    def fits(
        self, widths: np.ndarray, dropped: np.ndarray, limits: tuple[float, float]
    ) -> np.ndarray:
        """Which of N subnets keep limits of MACs and parameters; bool [N]. Arguments as for
        `price`; what is not limited is not priced."""
        extents = widths @ self._matrix + self._constant
        within = np.ones(len(widths), dtype=bool)
        for terms, most in zip((self._macs, self._params), limits, strict=True):
            if most != float("inf"):
                within &= self._sum(extents, dropped, terms) <= most
        return within

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
