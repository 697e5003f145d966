import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stp_ray.elastic.cost import Budget
from stp_ray.errors import BudgetError
from stp_ray.method import Expansion, Stimulation, ladder, sampler

from .spaces import make_space, slowed, spaces, spaces_with_budget

NAMES = ("uniform", "stratified", "sandwich", "narrowing")


@given(
    spaces_with_budget(),
    st.sampled_from(NAMES),
    st.integers(2, 4),
    st.integers(0, 2**32),
    st.floats(0, 1, exclude_max=True),
)
def test_every_sampler_gives_k_subnets_of_the_space_and_repeats_itself(
    drawn, name, count, seed, progress
):
    space, budget = drawn
    draw = sampler(Stimulation(subnets=count, sampler=name), space, [budget])
    subnets = draw(random.Random(seed), progress)
    assert len(subnets) == count
    for subnet in subnets:
        space.validate(subnet)
    assert subnets == draw(random.Random(seed), progress)


@given(spaces_with_budget(), st.integers(0, 2**32))
def test_narrowing_ends_within_the_budget(drawn, seed):
    space, budget = drawn
    draw = sampler(Stimulation(sampler="narrowing"), space, [budget])
    (subnet,) = draw(random.Random(seed), 1 - 1e-12)
    # the upper end is a linear function of progress: it is the budget only at the very end
    assert space.cost(subnet).macs <= budget.limits(space.cost())[0] + 1
    assert space.cost(subnet).params <= budget.limits(space.cost())[1] + 1


@given(spaces, st.floats(0, 1, exclude_max=True), st.integers(0, 2**32))
def test_narrowing_never_leaves_its_falling_limit(space, progress, seed):
    budget = Budget(macs=space.cost(space.smallest).macs)
    draw = sampler(Stimulation(sampler="narrowing"), space, [budget])
    (subnet,) = draw(random.Random(seed), progress)
    full = space.cost().macs
    assert space.cost(subnet).macs <= full + (budget.macs - full) * progress + 1e-6


def shares_drawn(space, budgets, progress, count=100):
    draw = sampler(Stimulation(sampler="narrowing"), space, budgets)
    drawn = [draw(random.Random(seed), progress)[0] for seed in range(count)]
    return [space.cost(subnet).macs / space.cost().macs for subnet in drawn]


@pytest.mark.parametrize("budgets", [(0.2, 0.9), (0.9, 0.2)])
def test_narrowing_goes_towards_each_budget(budgets):
    space = make_space([24, 24], [24])
    shares = shares_drawn(space, [Budget(macs=each) for each in budgets], 1 - 1e-12)
    assert max(shares) > 0.5
    assert sum(share <= 0.2 for share in shares) > 40


@pytest.mark.parametrize("progress", [0.0, 1 - 1e-12])
def test_narrowing_draws_small_subnets_at_all_times(progress):
    shares = shares_drawn(make_space([24, 24], [24]), [Budget(macs=0.8)], progress)
    assert sum(share < 0.3 for share in shares) > 20


def test_narrowing_goes_towards_a_latency():
    space = slowed(make_space([24, 24, 24], [24, 24]))
    draw = sampler(Stimulation(sampler="narrowing"), space, [Budget(macs=1.0, latency=0.3)])
    drawn = [draw(random.Random(seed), 1 - 1e-12)[0] for seed in range(100)]
    slowest = max(space.cost(subnet).latency_s for subnet in drawn)
    limit = 0.3 * space.cost().latency_s
    assert 0.7 * limit < slowest <= limit * (1 + 1e-6)


@given(spaces, st.integers(1, 5), st.integers(0, 2**32))
def test_stratified_keeps_each_part_of_the_range(space, count, seed):
    draw = sampler(Stimulation(subnets=count, sampler="stratified"), space, [])
    least, full = space.cost(space.smallest).macs, space.cost().macs
    for k, subnet in enumerate(draw(random.Random(seed), 0.0)):
        assert space.cost(subnet).macs <= least + (full - least) * (k + 1) / count


def test_stratified_spreads_over_the_range_of_macs():
    space = make_space([32, 32, 32], [32, 32])
    draw = sampler(Stimulation(sampler="stratified"), space, [])
    least, full = space.cost(space.smallest).macs, space.cost().macs
    shares = [
        (space.cost(draw(random.Random(seed), 0.0)[0]).macs - least) / (full - least)
        for seed in range(400)
    ]
    for quarter in range(4):
        inside = sum(quarter / 4 <= share < (quarter + 1) / 4 for share in shares)
        assert 40 <= inside <= 160  # dropped blocks keep some from the upper end


def test_sandwich_holds_the_smallest_subnet():
    space = make_space([16, 16], [16])
    draw = sampler(Stimulation(subnets=3, sampler="sandwich"), space, [])
    subnets = draw(random.Random(0), 0.0)
    assert subnets[0] == space.smallest
    assert space.smallest not in subnets[1:]


def test_narrowing_wants_budgets_that_can_be_kept():
    space = make_space([16], [])
    with pytest.raises(ValueError, match=r"budgets is \[\]; expected at least one"):
        sampler(Stimulation(sampler="narrowing"), space, [])
    with pytest.raises(BudgetError, match="cheapest"):
        sampler(Stimulation(sampler="narrowing"), space, [Budget(macs=1)])


@given(spaces, st.integers(0, 3), st.floats(0, 1), st.integers(0, 2**32), st.floats(0, 0.999))
def test_ladder_is_nested_from_large_to_small_and_contains_the_target(
    space, rungs, p, seed, progress
):
    target = space.sample(random.Random(seed + 1))
    options = Expansion(rungs=rungs, p_start=p, p_end=0.0)
    subnets = ladder(space, target, options)(random.Random(seed), progress)
    assert len(subnets) <= rungs
    for larger, smaller in pairwise([space.full, *subnets, target]):
        assert smaller.within(larger)
    for larger, smaller in pairwise([*subnets, space.canonical(target)]):
        assert larger != smaller


def test_ladder_leaves_out_the_rungs_that_are_equal_to_the_one_below():
    space = make_space([64] * 3, [16])
    target = space.uniform(0.25)
    drawn = ladder(space, target, Expansion(rungs=3, p_start=0.3))
    plain = [target]
    rng = random.Random(4)
    for _ in range(3):
        plain.append(space.expand(plain[-1], rng, 0.3))
    left = list(dict.fromkeys(plain))
    assert 1 < len(left) < len(plain)
    assert drawn(random.Random(4), 0.0) == left[:0:-1]
    assert ladder(space, target, Expansion(p_start=0.0))(rng, 0.0) == []
    assert ladder(space, space.full, Expansion(p_start=1.0))(rng, 0.0) == []


def test_ladder_follows_the_schedule_of_p():
    space = make_space([64] * 6, [])
    target = space.uniform(0.25)
    draw = ladder(space, target, Expansion(p_start=1.0, p_end=0.0))
    assert all(len(draw(random.Random(seed), 0.0)) == 1 for seed in range(50))
    assert all(draw(random.Random(seed), 0.999999) == [] for seed in range(50))


@pytest.mark.parametrize(("progress", "p"), [(0.0, 0.75), (0.25, 0.625), (0.5, 0.5), (0.75, 0.375)])
def test_the_ladder_s_p_is_linear_in_progress(progress, p):
    space = make_space([64] * 6, [16])
    target = space.uniform(0.25)
    draw = ladder(space, target, Expansion(p_start=0.75, p_end=0.25))
    for seed in range(20):
        expanded = space.expand(target, random.Random(seed), p)
        assert draw(random.Random(seed), progress) == [expanded] * (expanded != target)
