"""What a subnet's latency will be, from the measured latencies of a few [ours].

A device has its own seconds for a multiply-accumulate of each layer, for a channel that is read or
written, and for calling the layer at all. These are the terms of a table: it is priced by the same
arithmetic as MACs, and its coefficients are fitted to whole networks that were measured, so that
what a runtime fuses, reorders or waits for is in them. Clocks belong to the caller: everything here
depends on what they said alone.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .cost import SECOND, Budget, Extent, Term
from .space import SearchSpace
from .subnet import Subnet

#: Subnet -> seconds of a forward pass of one sample.
Clock = Callable[[Subnet], float]

#: Networks that a table is fitted to beside those near its budgets.
NETWORKS = 16
#: Networks near each budget.
NEAR = 8

#: Relative error of one measurement that the fit reckons with.
_NOISE = 0.05
#: How far, relatively, seconds of a layer may lie from those that all layers of a kind share.
_SPREAD = 0.3
#: Least share of the time that a kind of term is believed to take.
_LEAST = 0.02
#: Sizes of vectors that are tried.
_VECTORS = (1, 16, 32)
_SWEEPS = 200
_FOLDS = 5


@dataclass(frozen=True)
class Measured:
    """A network and what a clock said of it."""

    subnet: Subnet
    """The network."""
    seconds: float
    """Of a forward pass of one sample."""


@dataclass(frozen=True)
class LatencyTable:
    """Latency terms of a space on one device, and what they were fitted to [ours]."""

    terms: tuple[Term, ...]
    """In femtoseconds; `space.timed(terms)` prices with them."""
    networks: tuple[Measured, ...]
    """What was measured, the main network first."""
    error: float
    """Root mean square of the relative error of networks that were left out of a fit."""

    def to_content(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {
            "terms": [
                {
                    "femtoseconds": term.coefficient,
                    "extents": [
                        [e.constant, [list(part) for part in e.parts], e.multiple]
                        for e in term.extents
                    ],
                    "gates": sorted(term.gates),
                }
                for term in self.terms
            ],
            "networks": [
                {"subnet": each.subnet.to_json(), "seconds": each.seconds} for each in self.networks
            ],
            "error": self.error,
        }

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "LatencyTable":
        """Back from `to_content`.

        Args:
            content: what JSON held.

        Raises:
            ValueError: it is no such table.
        """
        try:
            return cls(
                tuple(
                    Term(
                        int(term["femtoseconds"]),
                        tuple(
                            Extent(
                                int(constant),
                                tuple((str(axis), int(factor)) for axis, factor in parts),
                                int(multiple),
                            )
                            for constant, parts, multiple in term["extents"]
                        ),
                        frozenset(map(str, term["gates"])),
                    )
                    for term in content["terms"]
                ),
                tuple(
                    Measured(Subnet.from_json(each["subnet"]), float(each["seconds"]))
                    for each in content["networks"]
                ),
                float(content["error"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"not a latency table ({error!r}); expected terms, networks and error; measure anew"
            ) from error


def tabulate(
    space: SearchSpace, clock: Clock, budgets: Sequence[Budget], seed: int
) -> LatencyTable:
    """Measure networks from the smallest to the full one, and then near each budget, and fit
    terms to them.

    Args:
        space: what to price.
        clock: measures a subnet.
        budgets: those that bound latency are looked at closely.
        seed: decides which networks are measured.

    Raises:
        BudgetError: no subnet keeps a budget.
    """
    rng = random.Random(f"latency:{seed}")
    least, full = space.cost(space.smallest).macs, space.cost().macs
    chosen = [space.full, space.smallest, *(space.uniform(ratio) for ratio in (0.25, 0.5, 0.75))]
    while len(chosen) < NETWORKS:
        # Spread by their logarithm: a small network is as likely to be asked for as a large one.
        macs = int(least * (full / least) ** rng.random())
        chosen.append(space.sample(rng, Budget(macs=max(macs, least))))
    measured = _measured(chosen, clock)
    for budget in budgets:
        if not budget.timed:
            continue
        timed = space.timed(fit(space, measured))
        timed.require(budget)
        near = [timed.uniform_within(budget)]
        near += [timed.sample(rng, budget) for _ in range(NEAR - 1)]
        measured += _measured([s for s in near if s not in {m.subnet for m in measured}], clock)
    error = min(_left_out(space, measured, vector) for vector in _VECTORS)
    return LatencyTable(fit(space, measured), tuple(measured), error)


def _measured(subnets: Iterable[Subnet], clock: Clock) -> list[Measured]:
    return [Measured(subnet, clock(subnet)) for subnet in dict.fromkeys(subnets)]


def fit(space: SearchSpace, measured: Sequence[Measured]) -> tuple[Term, ...]:
    """Latency terms, in femtoseconds, that explain what was measured: at first one rate for all
    products, all channels and all calls of layers, and then each layer as far from it as the
    measurements tell. No term is negative, so that a part of a network is never slower than it.

    Devices work on whole vectors of channels: lengths count up to the next multiple of the size
    with which networks that are left out of a fit are estimated best.

    Args:
        space: whose layers to find terms for.
        measured: at least the full network, which comes first.
    """
    errors = {vector: _left_out(space, measured, vector) for vector in _VECTORS}
    return _fitted(space, measured, min(_VECTORS, key=lambda vector: errors[vector]))


def _fitted(space: SearchSpace, measured: Sequence[Measured], vector: int) -> tuple[Term, ...]:
    kinds, terms = _basis(space, vector)
    values = np.array([[_value(term, each.subnet) for term in terms] for each in measured])
    seconds = np.array([each.seconds for each in measured])
    chosen = sorted(set(kinds))
    sums = np.stack([values[:, [kind == k for kind in kinds]].sum(axis=1) for k in chosen], axis=1)
    # What a kind would take for each unit if the whole time were its own.
    scale = seconds.sum() / np.maximum(sums.sum(axis=0), 1e-300)
    shares = _solve(sums * scale, seconds, np.full(len(chosen), 1 / len(chosen)), spread=3.0)
    rates = dict(zip(chosen, np.maximum(shares, _LEAST) * scale, strict=True))
    rate = np.array([rates[kind] for kind in kinds])
    factors = _solve(values * rate, seconds, np.ones(len(terms)), spread=_SPREAD)
    return tuple(
        Term(amount, term.extents, term.gates)
        for term, factor in zip(terms, factors * rate, strict=True)
        if (amount := round(factor * term.coefficient * SECOND)) > 0
    )


def _basis(space: SearchSpace, vector: int) -> tuple[list[str], list[Term]]:
    """Kinds and terms that latency may be made of: for each layer its product of extents, each
    extent that differs between subnets, and one for calling it; and one for the network."""
    found: dict[tuple[str, tuple[Extent, ...], frozenset[str]], int] = {}

    def add(kind: str, amount: int, extents: tuple[Extent, ...], gates: frozenset[str]) -> None:
        key = (kind, extents, gates)
        found[key] = found.get(key, 0) + amount

    add("call", 1, (), frozenset())
    for term in space.terms:
        extents = tuple(replace(e, multiple=vector) if e.parts else e for e in term.extents)
        add("product", term.coefficient, extents, term.gates)
        add("call", 1, (), term.gates)
        elastic = [extent for extent in extents if extent.parts]
        for extent in elastic if len(elastic) > 1 else ():
            add("channels", term.coefficient, (extent,), term.gates)
    terms = [Term(amount, extents, gates) for (_, extents, gates), amount in found.items()]
    return [kind for kind, _, _ in found], terms


def _value(term: Term, subnet: Subnet) -> float:
    if term.gates & subnet.dropped:
        return 0.0
    return float(term.coefficient * math.prod(e.at(subnet.widths) for e in term.extents))


def _solve(
    values: np.ndarray, seconds: np.ndarray, expected: np.ndarray, spread: float
) -> np.ndarray:
    """Factors [T], none negative, with which `values` [N, T] add up to `seconds` [N]: least squares
    of relative errors, held near to `expected` [T]."""
    rows = values / seconds[:, None] / _NOISE
    curve = rows.T @ rows + np.eye(len(expected)) / spread**2
    pull = rows.sum(axis=0) / _NOISE + expected / spread**2
    factors = expected.astype(float)
    for _ in range(_SWEEPS):
        for place in range(len(factors)):
            step = (curve[place] @ factors - pull[place]) / curve[place, place]
            factors[place] = max(0.0, factors[place] - step)
    return factors


def _left_out(space: SearchSpace, measured: Sequence[Measured], vector: int) -> float:
    """The error for networks that a fit has not seen; the main network is in every fit."""
    errors = []
    for fold in range(_FOLDS):
        seen = [m for place, m in enumerate(measured) if place == 0 or place % _FOLDS != fold]
        unseen = [m for place, m in enumerate(measured) if place and place % _FOLDS == fold]
        costs = space.timed(_fitted(space, seen, vector)).costs([each.subnet for each in unseen])
        for each, cost in zip(unseen, costs, strict=True):
            assert cost.latency_s is not None
            errors.append(cost.latency_s / each.seconds - 1)
    return math.sqrt(sum(error**2 for error in errors) / max(len(errors), 1))
