"""The last step of a search under a latency budget: clocks decide, not estimates [ours]."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..elastic.cost import Budget
from ..elastic.latency import Clock
from ..elastic.space import SearchSpace
from ..elastic.subnet import Subnet
from ..errors import BudgetError
from .checks import require
from .explore import Scored

#: Candidates that are measured before one is cut down.
LOOKS = 12
#: Times that a candidate is cut down, at most.
CUTS = 12
#: A candidate is measured if it is thought to take no more than this many times the limit.
_SLACK = 1.03
#: What is cut down shall take more than this share of the limit.
_NEAR = 0.9
#: How far below the limit the next cut aims.
_MARGIN = 1.02


@dataclass(frozen=True)
class Met:
    """A subnet whose measured latency keeps a budget."""

    subnet: Subnet
    """What was chosen."""
    scored: bool
    """Whether it is one of the candidates; else the best of them was cut down to it."""
    seconds: float
    """Its measured latency for one sample."""
    limit_s: float
    """The longest that the budget allows."""
    looks: int
    """Networks that were measured."""


def meet(
    space: SearchSpace,
    budget: Budget,
    ranked: Sequence[Scored],
    clock: Clock,
    full_s: float,
    seed: int,
) -> Met:
    """The best candidate whose measured latency keeps a budget [ours].

    Candidates are measured from the best on. What they take beside their estimates tells which of
    the others are worth a look. If none of those keeps the budget, the best is cut down, by single
    steps of its widths, to a limit that is lowered by as much as the estimates are missed.

    Args:
        space: with terms of latency.
        budget: that bounds it.
        ranked: candidates that keep the budget by their estimates, best first.
        clock: measures a subnet.
        full_s: measured seconds of the full network.
        seed: decides how a candidate is cut down.

    Raises:
        ValueError: there are no candidates, or the space has no terms of latency.
        BudgetError: nothing that was measured keeps the budget.
    """
    require(len(ranked) > 0, "ranked", list(ranked), "at least one", "score some")
    full = replace(space.cost(), latency_s=full_s)
    limit = budget.limits(full)[2]
    subnets = [scored.subnet for scored in ranked]
    estimates = dict(zip(subnets, _estimates(space, subnets), strict=True))
    pace = full_s / _estimates(space, [space.full])[0]  # of the device now, beside the table's
    ratios: list[float] = []
    ratio = 1.0
    for scored in ranked:
        estimate = pace * estimates[scored.subnet]
        if ratios and estimate * ratio > _SLACK * limit:
            continue
        seconds = clock(scored.subnet)
        ratios.append(seconds / estimate)
        ratio = statistics.median(ratios)
        if seconds <= limit:
            return Met(scored.subnet, True, seconds, limit, len(ratios))
        if len(ratios) == LOOKS:
            break
    met = _cut_down(space, budget, ranked[0].subnet, clock, limit, pace * ratio, seed)
    if met is None:
        raise BudgetError(
            f"nothing that was measured keeps the budget {budget.label}: expected at most "
            f"{1e3 * limit:.4g} ms, where candidates take {ratio:.3g} times what the table says; "
            "raise the budget, or measure on a quieter machine"
        )
    return replace(met, looks=met.looks + len(ratios))


def _cut_down(
    space: SearchSpace,
    budget: Budget,
    best: Subnet,
    clock: Clock,
    limit: float,
    ratio: float,
    seed: int,
) -> Met | None:
    """The slowest that keeps the limit of what is left of a candidate at limits that move by as
    much as the last one was missed, until one is near."""
    rng = random.Random(f"meet:{seed}:{budget.label}")
    found, looks = None, 0
    for _ in range(CUTS):
        bounds = replace(budget, latency=None, latency_ms=1e3 * limit / ratio)
        if not space.admits(space.smallest, bounds):
            break
        subnet = space.mutate(best, rng, 0.0, bounds)
        seconds, looks = clock(subnet), looks + 1
        if seconds <= limit and (found is None or seconds > found.seconds):
            found = Met(subnet, False, seconds, limit, looks)
        if found is not None and found.seconds > _NEAR * limit:
            break
        ratio *= _MARGIN * seconds / limit
    return found and replace(found, looks=looks)


def _estimates(space: SearchSpace, subnets: Sequence[Subnet]) -> list[float]:
    found = [cost.latency_s for cost in space.costs(subnets)]
    known = [seconds for seconds in found if seconds is not None]
    require(len(known) == len(found), "space", space, "terms of latency", "use space.timed(terms)")
    return known
