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
#: Times that a candidate is cut down.
CUTS = 6
#: A candidate is measured if it is thought to take no more than this many times the limit.
_SLACK = 1.03


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
    for scored in ranked:
        estimate = pace * estimates[scored.subnet]
        if ratios and estimate * statistics.median(ratios) > _SLACK * limit:
            continue
        seconds = clock(scored.subnet)
        ratios.append(seconds / estimate)
        if seconds <= limit:
            return Met(scored.subnet, True, seconds, limit, len(ratios))
        if len(ratios) == LOOKS:
            break
    rng = random.Random(f"meet:{seed}:{budget.label}")
    best, ratio = ranked[0].subnet, pace * statistics.median(ratios)
    for cut in range(CUTS):
        bounds = replace(budget, latency=None, latency_ms=1e3 * limit / ratio)
        subnet = space.mutate(best, rng, 0.0, bounds)
        seconds = clock(subnet)
        if seconds <= limit:
            return Met(subnet, False, seconds, limit, len(ratios) + cut + 1)
        ratio *= 1.02 * seconds / limit
    raise BudgetError(
        f"no subnet was found whose measured latency keeps the budget {budget.label}: expected at "
        f"most {1e3 * limit:.4g} ms, found {1e3 * seconds:.4g} ms where the table says "
        f"{1e3 * limit / ratio:.4g} ms; raise the budget, or measure on a quieter machine"
    )


def _estimates(space: SearchSpace, subnets: Sequence[Subnet]) -> list[float]:
    found = [cost.latency_s for cost in space.costs(subnets)]
    known = [seconds for seconds in found if seconds is not None]
    require(len(known) == len(found), "space", space, "terms of latency", "use space.timed(terms)")
    return known
