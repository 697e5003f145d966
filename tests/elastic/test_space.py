import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stp_ray.elastic import Budget, ResidualBlock, SearchSpace, Subnet, WidthAxis
from stp_ray.elastic.cost import Extent, Term
from stp_ray.errors import BudgetError

from .spaces import spaces, spaces_with_budget, timed_spaces, timed_spaces_with_budget

seeds = st.integers(0, 2**32)
shares = st.floats(0, 1)


def small_space() -> SearchSpace:
    """A stem of 64, a residual block with a hidden width of 16, a head."""
    stem, hidden = Extent(0, (("stem", 1),)), Extent(0, (("hidden", 1),))
    block = frozenset(["block"])
    terms = [Term(27, (stem,)), Term(9, (stem, hidden), block), Term(10, (stem,))]
    axes = [WidthAxis("stem", 64, tuple(range(8, 65, 8))), WidthAxis("hidden", 16, (4, 8, 12, 16))]
    return SearchSpace(axes, [ResidualBlock("block", ("hidden",))], terms, terms)


def assert_belongs(space: SearchSpace, subnet: Subnet) -> None:
    space.validate(subnet)
    assert subnet == space.canonical(subnet)
    assert space.smallest.within(subnet) and subnet.within(space.full)


@given(spaces, seeds)
def test_draws_belong_to_the_space_and_repeat_themselves(space, seed):
    def draws(seed: int) -> list[Subnet]:
        rng = random.Random(seed)
        one, other = space.sample(rng), space.sample(rng)
        return [
            one,
            other,
            space.mutate(one, rng, 0.5),
            space.crossover(one, other, rng),
            space.expand(one, rng, 0.5),
        ]

    found = draws(seed)
    for subnet in found:
        assert_belongs(space, subnet)
    assert draws(seed) == found


@settings(max_examples=60)
@given(spaces_with_budget() | timed_spaces_with_budget(), seeds, shares)
def test_no_draw_exceeds_its_budget(drawn, seed, p):
    space, budget = drawn
    rng = random.Random(seed)
    one, other = space.sample(rng, budget), space.sample(rng)
    for subnet in (
        one,
        space.mutate(one, rng, p, budget),
        space.mutate(other, rng, p, budget),
        space.mutate(space.full, rng, p, budget),
        space.crossover(one, other, rng, budget),
        space.crossover(other, space.full, rng, budget),
        space.uniform_within(budget),
    ):
        assert_belongs(space, subnet)
        assert space.admits(subnet, budget)
        assert budget.admits(space.cost(subnet), of=space.cost())


@settings(max_examples=60)
@given(spaces_with_budget() | timed_spaces_with_budget(), seeds)
def test_a_filled_subnet_has_no_room_for_a_wider_axis(drawn, seed):
    space, budget = drawn
    for subnet in (space.uniform_within(budget), space.sample(random.Random(seed), budget)):
        filled = space.fill(subnet, budget)
        assert_belongs(space, filled)
        assert subnet.within(filled) and filled.dropped == subnet.dropped
        assert space.admits(filled, budget)
        for axis in space.axes:
            width = filled.widths[axis.name]
            for wider in [choice for choice in axis.choices if choice > width][:1]:
                grown = Subnet({**filled.widths, axis.name: wider}, filled.dropped)
                assert space.canonical(grown) == filled or not space.admits(grown, budget)
    assert space.fill(space.full, budget) == space.full


def test_the_narrowest_axis_is_filled_first():
    space = small_space()
    start = Subnet({"stem": 16, "hidden": 8})
    costs = {
        widths: space.cost(Subnet(dict(zip(("stem", "hidden"), widths, strict=True)))).macs
        for widths in ((24, 8), (24, 12), (32, 8))
    }
    assert space.fill(start, Budget(macs=costs[24, 12])).widths == {"stem": 24, "hidden": 12}
    assert space.fill(start, Budget(macs=costs[32, 8])).widths == {"stem": 32, "hidden": 8}


@given(spaces, seeds, shares)
def test_expansion_contains_its_subnet_and_stays_within_the_full_network(space, seed, p):
    rng = random.Random(seed)
    subnet = space.sample(rng)
    larger = space.expand(subnet, rng, p)
    assert subnet.within(larger) and larger.within(space.full)
    assert space.cost(subnet).macs <= space.cost(larger).macs
    assert space.expand(subnet, rng, 0.0) == subnet
    assert not space.expand(subnet, rng, 1.0).dropped


def test_expansion_contains_widths_inside_a_dropped_block_too():
    space = small_space()
    subnet = Subnet({"stem": 16, "hidden": 8}, [block.name for block in space.blocks])
    assert space.canonical(subnet) != subnet  # its block has no widths
    for p in (0.0, 0.5, 1.0):
        assert subnet.within(space.expand(subnet, random.Random(0), p))


@given(spaces, seeds)
def test_canonical_is_the_same_network_once(space, seed):
    rng = random.Random(seed)
    free = Subnet(
        {axis.name: rng.choice(axis.choices) for axis in space.axes},
        [block.name for block in space.blocks if rng.random() < 0.5],
    )
    found = space.canonical(free)
    assert space.canonical(found) == found
    inner = {block.name for block in space.blocks if free.dropped.intersection(block.within)}
    assert found.dropped == free.dropped | inner and found.within(free)
    dead = {axis for block in space.blocks if block.name in free.dropped for axis in block.axes}
    floors = space.smallest.widths
    for name, width in found.widths.items():
        assert width == (floors[name] if name in dead else free.widths[name])


def test_subnets_that_differ_inside_a_dropped_block_alone_are_one():
    space = small_space()
    subnets = {
        space.canonical(Subnet({**space.full.widths, "hidden": width}, ["block"]))
        for width in (4, 8, 16)
    }
    assert len(subnets) == 1


@given(spaces, shares)
def test_uniform_takes_the_nearest_width_everywhere(space, ratio):
    subnet = space.uniform(ratio)
    assert not subnet.dropped
    for axis in space.axes:
        gap = abs(subnet.widths[axis.name] - ratio * axis.size)
        assert gap == min(abs(choice - ratio * axis.size) for choice in axis.choices)
    assert space.uniform(1.0) == space.full


@given(spaces, shares, shares)
def test_uniform_grows_with_its_ratio(space, one, other):
    small, large = sorted((one, other))
    assert space.uniform(small).within(space.uniform(large))


@given(spaces)
def test_a_budget_that_nothing_keeps_names_the_cheapest_cost(space):
    least = space.cost(space.smallest)
    assume(least.macs > 1)
    budget = Budget(macs=least.macs - 1)
    rng = random.Random(0)
    for attempt in (
        lambda: space.require(budget),
        lambda: space.sample(rng, budget),
        lambda: space.mutate(space.full, rng, 0.5, budget),
        lambda: space.crossover(space.full, space.smallest, rng, budget),
        lambda: space.uniform_within(budget),
    ):
        with pytest.raises(BudgetError) as caught:
            attempt()
        message = str(caught.value)
        assert f"costs {least.macs:,} MACs" in message
        assert f"{least.params:,} params" in message
        assert budget.label in message and "\n" not in message
    space.require(Budget(macs=least.macs))


@given(timed_spaces(), seeds)
def test_a_part_of_a_network_is_estimated_to_be_no_slower(space, seed):
    rng = random.Random(seed)
    subnet = space.sample(rng)
    larger = space.expand(subnet, rng, 0.5)
    assert 0 < space.cost(subnet).latency_s <= space.cost(larger).latency_s
    assert space.cost(larger).latency_s <= space.cost().latency_s


@given(timed_spaces(), seeds)
def test_latency_changes_no_other_price_and_no_draw(space, seed):
    bare = SearchSpace(space.axes, space.blocks, space.terms, space.terms)
    timed = bare.timed([Term(1, ())])
    budget = Budget(macs=max(bare.cost(bare.smallest).macs, bare.cost().macs // 2))
    drawn = [each.sample(random.Random(seed), budget) for each in (bare, timed)]
    assert drawn[0] == drawn[1]
    assert replace(timed.cost(drawn[0]), latency_s=None) == bare.cost(drawn[0])


def test_a_space_without_terms_of_latency_refuses_to_judge_it():
    with pytest.raises(ValueError, match=r"space\.timed"):
        small_space().sample(random.Random(0), Budget(latency=0.5))


def test_a_latency_that_nothing_keeps_names_the_cheapest():
    space = small_space().timed([Term(10**12, ()), Term(10**10, (Extent(0, (("stem", 1),)),))])
    with pytest.raises(BudgetError, match=r"and about 1\.08 ms \(0\.6585\); raise the budget"):
        space.require(Budget(latency_ms=1))


def test_samples_use_the_budget_that_they_are_given():
    space = small_space()
    budget = Budget(macs=0.6)
    rng = random.Random(0)
    shares = [space.cost(space.sample(rng, budget)).macs / space.cost().macs for _ in range(200)]
    assert max(shares) <= 0.6
    assert sum(shares) / len(shares) > 0.4


def test_a_dropped_block_comes_back_only_where_the_budget_has_room_for_it():
    block = frozenset(["block"])
    terms = [Term(8, ()), Term(50, (), block)]
    space = SearchSpace([WidthAxis("stem", 4, (2, 4))], [ResidualBlock("block")], terms, terms)
    for seed in range(20):
        assert space.sample(random.Random(seed), Budget(macs=20)).dropped == block


def test_samples_reach_all_of_a_small_space():
    space = small_space()
    rng = random.Random(0)
    drawn = {space.sample(rng) for _ in range(3000)}
    # with the block: 8 x 4 widths; without it: 8
    assert len(drawn) == 8 * 4 + 8


def test_mutation_changes_nothing_at_zero_and_reaches_far_at_one():
    space = small_space()
    rng = random.Random(0)
    start = space.uniform(0.5)
    assert space.mutate(start, rng, 0.0) == start
    reached = {space.mutate(start, rng, 1.0) for _ in range(500)}
    assert {subnet.widths["stem"] for subnet in reached} == set(space.axes[0].choices)
    assert any(subnet.dropped for subnet in reached)


@given(spaces, seeds)
def test_crossover_takes_every_part_from_a_parent(space, seed):
    rng = random.Random(seed)
    one, other = space.sample(rng), space.sample(rng)
    child = space.crossover(one, other, rng)
    assert one.dropped & other.dropped <= child.dropped <= one.dropped | other.dropped
    for name, width in child.widths.items():
        assert width in (one.widths[name], other.widths[name], space.smallest.widths[name])
    assert space.crossover(one, one, rng) == one


@pytest.mark.parametrize(
    ("subnet", "message"),
    [
        (Subnet({"stem": 8}), r"names other axes than this space: \['hidden'\]"),
        (Subnet({"stem": 8, "hidden": 4, "odd": 1}), r"\['odd'\]"),
        (Subnet({"stem": 9, "hidden": 4}), "width 9 of stem is not among"),
        (Subnet({"stem": 8, "hidden": 4}, ["no"]), r"unknown blocks: \['no'\]"),
    ],
)
def test_a_subnet_of_another_space_is_refused(subnet, message):
    space, rng = small_space(), random.Random(0)
    refusing = (
        lambda: space.validate(subnet),
        lambda: space.expand(subnet, rng, 0.5),
        lambda: space.mutate(subnet, rng, 0.5),
        lambda: space.crossover(space.full, subnet, rng),
    )
    for attempt in refusing:
        with pytest.raises(ValueError, match=message):
            attempt()


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_ratio_or_a_probability_out_of_range_is_refused(share):
    space, rng = small_space(), random.Random(0)
    with pytest.raises(ValueError, match=r"ratio is .*; expected a number in \[0, 1\]"):
        space.uniform(share)
    for draw in (space.expand, space.mutate):
        with pytest.raises(ValueError, match=r"p is .*; expected a number in \[0, 1\]"):
            draw(space.full, rng, share)


@given(spaces_with_budget(), shares)
def test_no_uniform_subnet_within_the_budget_is_larger_than_the_one_that_is_found(drawn, ratio):
    space, budget = drawn
    other = space.uniform(round(200 * ratio) / 200)
    largest = space.cost(space.uniform_within(budget)).macs
    assert not space.admits(other, budget) or space.cost(other).macs <= largest


def test_expansion_reaches_every_width_above():
    space, narrow = small_space(), Subnet({"stem": 24, "hidden": 4})
    reached = [space.expand(narrow, random.Random(seed), 1.0).widths for seed in range(300)]
    assert {widths["stem"] for widths in reached} == set(range(24, 65, 8))
    assert {widths["hidden"] for widths in reached} == {4, 8, 12, 16}


def test_a_mutation_uses_what_is_left_of_the_budget():
    space, narrow = small_space(), Subnet({"stem": 8, "hidden": 4})
    grown = space.mutate(narrow, random.Random(0), 0.0, Budget(macs=1.0))
    assert grown.widths == {"stem": 16, "hidden": 8}


def test_a_block_comes_from_one_parent_with_the_axes_inside_it():
    space = small_space()
    for seed in range(50):
        child = space.crossover(space.full, space.smallest, random.Random(seed))
        assert child.widths["hidden"] == (4 if child.dropped else 16)


def test_a_block_that_comes_back_has_any_width():
    space = small_space()
    found = [space.mutate(space.smallest, random.Random(seed), 0.2) for seed in range(2000)]
    back = Counter(subnet.widths["hidden"] for subnet in found if not subnet.dropped)
    assert set(back) == {4, 8, 12, 16}
    assert back[4] < 0.5 * back.total()


def test_a_mutation_steps_both_ways():
    space, middle = small_space(), Subnet({"stem": 32, "hidden": 8})
    found = [space.mutate(middle, random.Random(seed), 1.0) for seed in range(300)]
    near = Counter(subnet.widths["stem"] for subnet in found)
    # half of them are 1 or 2 steps of 8 away, to either side
    assert min(near[16] + near[24], near[40] + near[48]) > 0.25 * near.total()


def test_what_draws_is_a_random_number_generator():
    space = small_space()
    for draw in (
        lambda rng: space.expand(space.full, rng, 0.5),
        lambda rng: space.mutate(space.full, rng, 0.5),
        lambda rng: space.crossover(space.full, space.full, rng),
    ):
        for rng in (None, 0, random):
            with pytest.raises(ValueError, match=r"rng is .*; expected a random\.Random\(seed\)"):
                draw(rng)


def test_a_number_is_no_budget():
    with pytest.raises(ValueError, match=r"budget is 0\.5; expected a Budget, such as"):
        small_space().sample(random.Random(0), 0.5)


def test_a_latency_that_cannot_be_counted_is_refused():
    channels = Term(10**17, (Extent(0, (("stem", 1),)),))  # 100 s for each of the 64
    assert small_space().timed([channels]).cost().latency_s == 6400
    with pytest.raises(ValueError, match=r"add up to 1\.28e\+04 s .*; expected 0 to 9,223 s"):
        small_space().timed([channels, channels])
    with pytest.raises(ValueError, match="add up to -"):
        small_space().timed([Term(-1, ())])


def test_a_space_describes_itself():
    assert repr(small_space()) == ("SearchSpace(2 axes, 1 droppable blocks, 296 to 11,584 MACs)")
