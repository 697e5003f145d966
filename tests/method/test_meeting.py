import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stp_ray.elastic.cost import Budget
from stp_ray.errors import BudgetError
from stp_ray.method import Scored
from stp_ray.method.meeting import CUTS, LOOKS, meet

from .spaces import make_space, slowed

BARE = make_space([24, 24, 24], [24, 24])
SPACE = slowed(BARE)
FULL = SPACE.cost().latency_s
BUDGET = Budget(latency=0.5)


def candidates(count: int = 40, seed: int = 0) -> list[Scored]:
    """Candidates within the budget by their estimates, best first."""
    rng = random.Random(seed)
    found = dict.fromkeys(SPACE.sample(rng, BUDGET) for _ in range(count))
    return [
        Scored(subnet, score / 100, 0, 0, SPACE.cost(subnet)) for score, subnet in enumerate(found)
    ]


class Device:
    """Takes `factor` of what the table says, and some noise of its own for each network."""

    def __init__(self, factor: float = 1.0, noise: float = 0.0) -> None:
        self.factor, self.noise, self.asked = factor, noise, []

    def __call__(self, subnet):
        self.asked.append(subnet)
        noise = random.Random(f"{subnet.id}").uniform(-self.noise, self.noise)
        return SPACE.cost(subnet).latency_s * self.factor * (1 + noise)


def test_the_best_candidate_is_taken_where_the_table_is_right():
    device = Device()
    met = meet(SPACE, BUDGET, candidates(), device, FULL, seed=0)
    assert met.subnet == candidates()[0].subnet and met.scored and met.looks == 1
    assert 0.9 * met.limit_s < met.seconds <= met.limit_s == 0.5 * FULL


def test_a_device_that_changed_its_pace_makes_no_difference_to_a_fraction():
    met = meet(SPACE, BUDGET, candidates(), Device(3.0), 3 * FULL, seed=0)
    assert met.subnet == candidates()[0].subnet and met.limit_s == pytest.approx(1.5 * FULL)


@settings(max_examples=25)
@given(st.floats(0.8, 1.6), st.floats(0, 0.15), st.integers(0, 2**32))
@example(1.5, 0.146484375, 9309)  # near at the tenth cut alone
def test_a_budget_is_kept_however_the_table_is_wrong(factor, noise, seed):
    device = Device(factor, noise)
    ranked = candidates(seed=seed)
    met = meet(SPACE, BUDGET, ranked, device, FULL, seed)
    assert Device(factor, noise)(met.subnet) == met.seconds <= met.limit_s
    assert met.looks == len(device.asked) <= LOOKS + CUTS
    assert met.scored == (met.subnet in {scored.subnet for scored in ranked})
    assert met == meet(SPACE, BUDGET, ranked, Device(factor, noise), FULL, seed)
    if not met.scored:
        assert met.seconds > 0.8 * met.limit_s  # cut down no further than it has to be


def test_no_candidate_that_is_sure_to_miss_is_measured():
    device = Device(1.5)
    met = meet(SPACE, BUDGET, candidates(), device, FULL, seed=0)
    assert not met.scored and met.looks <= 3


def test_a_clock_that_never_agrees_ends_in_one_line():
    with pytest.raises(BudgetError, match=r"keeps the budget latency-0\.5: expected at most") as e:
        meet(SPACE, BUDGET, candidates(), lambda subnet: FULL, FULL, seed=0)
    assert "\n" not in str(e.value)


def test_nothing_to_choose_from_is_refused():
    with pytest.raises(ValueError, match="ranked"):
        meet(SPACE, BUDGET, [], Device(), FULL, seed=0)
    ranked = [Scored(BARE.full, 0.0, 0, 0, BARE.cost())]
    with pytest.raises(ValueError, match="terms of latency"):
        meet(BARE, BUDGET, ranked, Device(), FULL, seed=0)
