"""Which subnets to train next. Every draw depends on its random numbers and the progress
alone, so nothing about the sampler has to be saved."""

import math
import random
from collections.abc import Sequence

from ..elastic.cost import Budget, Cost
from ..elastic.space import SearchSpace
from ..elastic.subnet import Subnet
from .checks import require
from .objective import Expansion, Stimulation
from .training import Draw


def sampler(options: Stimulation, space: SearchSpace, budgets: Sequence[Budget]) -> Draw:
    """The subnets of a stimulative step, `options.subnets` of them, by one of four rules [ours].

    - uniform: any subnet of the space.
    - stratified: a MACs limit drawn uniformly between the smallest and the full network; of
      K subnets, the k-th has its limit in the k-th of K equal parts of that range.
    - sandwich: the smallest subnet, and any for the others.
    - narrowing: the limit is drawn between the smallest network and an upper end that falls
      linearly from the full network to the budget; each subnet takes one of the budgets.

    Args:
        options: K and the name of the sampler.
        space: where to draw from.
        budgets: read by "narrowing" alone.

    Raises:
        ValueError: "narrowing" without budgets.
        BudgetError: "narrowing" with a budget that no subnet keeps.
    """
    count = options.subnets
    least, full = space.cost(space.smallest), space.cost()
    if options.sampler == "narrowing":
        require(
            len(budgets) > 0,
            "budgets",
            list(budgets),
            "at least one with the narrowing sampler",
            "name a budget or choose another sampler",
        )
        for budget in budgets:
            space.require(budget)

    def uniform(rng: random.Random, progress: float) -> list[Subnet]:
        return [space.sample(rng) for _ in range(count)]

    def stratified(rng: random.Random, progress: float) -> list[Subnet]:
        places = [(k + rng.random()) / count for k in range(count)]
        limits = [_between(least.macs, full.macs, place) for place in places]
        return [space.sample(rng, Budget(macs=limit)) for limit in limits]

    def sandwich(rng: random.Random, progress: float) -> list[Subnet]:
        return [space.smallest, *(space.sample(rng) for _ in range(count - 1))]

    def narrowing(rng: random.Random, progress: float) -> list[Subnet]:
        drawn = []
        for _ in range(count):
            macs, params, seconds = rng.choice(budgets).limits(full)
            place = rng.random()
            drawn.append(
                space.sample(
                    rng,
                    Budget(
                        macs=_narrowed(least.macs, full.macs, macs, progress, place),
                        params=_narrowed(least.params, full.params, params, progress, place),
                        latency_ms=_narrowed_ms(least, full, seconds, progress, place),
                    ),
                )
            )
        return drawn

    samplers: dict[str, Draw] = {
        "uniform": uniform,
        "stratified": stratified,
        "sandwich": sandwich,
        "narrowing": narrowing,
    }
    return samplers[options.sampler]


def _between(low: float, high: float, place: float) -> int:
    return max(1, int(low + (high - low) * place))


def _narrowed(least: int, full: int, limit: float, progress: float, place: float) -> int | None:
    """A limit between `least` and an upper end that is `full` at first and `limit` at last."""
    if math.isinf(limit):
        return None
    upper = full + (min(limit, full) - full) * progress
    return _between(least, upper, place)


def _narrowed_ms(
    least: Cost, full: Cost, seconds: float, progress: float, place: float
) -> float | None:
    """As `_narrowed`, in milliseconds."""
    if math.isinf(seconds) or least.latency_s is None or full.latency_s is None:
        return None
    upper = full.latency_s + (min(seconds, full.latency_s) - full.latency_s) * progress
    # A hair more: going from seconds and back must not fall below the smallest network.
    return 1e3 * (least.latency_s + (upper - least.latency_s) * place) * (1 + 1e-9) + 1e-9


def ladder(space: SearchSpace, target: Subnet, options: Expansion) -> Draw:
    """The expanded subnets of a step, nested: target within the last within ... the first [paper].

    Each is expanded in the space from the one below it with a probability that moves linearly
    from `options.p_start` to `options.p_end`. One that comes out equal to the one below would teach
    it nothing and cost a pass: it is left out, so that a step has at most `options.rungs` [ours].
    """
    foot = space.canonical(target)

    def draw(rng: random.Random, progress: float) -> list[Subnet]:
        p = options.p_start + (options.p_end - options.p_start) * progress
        rungs = [foot]
        for _ in range(options.rungs):
            rung = space.expand(rungs[-1], rng, p)
            if rung != rungs[-1]:
                rungs.append(rung)
        return rungs[:0:-1]

    return draw
