import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stp_ray.elastic import SearchSpace
from stp_ray.elastic.cost import Budget, Extent, Term
from stp_ray.errors import BudgetError, RunError
from stp_ray.method import Candidate, Exploration, Explorer

from .spaces import make_space, spaces_with_budget

SMALL = Exploration(generations=3, population=8, parents=4, scoring_images=16)


def made_up(candidate: Candidate) -> float:
    """A score that falls with the size of the network, with some noise at low fidelity."""
    noise = random.Random(candidate.key).random()
    size = sum(candidate.subnet.widths.values()) - 5 * len(candidate.subnet.dropped)
    return 2.0 ** (-size / 20) + noise * (0.5 if candidate.images else 0.05)


def search(explorer: Explorer, score=made_up) -> Explorer:
    while candidates := explorer.ask():
        explorer.tell({c.key: score(c) for c in candidates})
    return explorer


@settings(max_examples=12)
@given(spaces_with_budget(), st.integers(0, 2**32))
def test_candidates_keep_a_budget_and_are_asked_for_once(drawn, seed):
    space, budget = drawn
    budgets = [budget, Budget(macs=1.0)]
    explorer = Explorer(space, budgets, SMALL, seed)
    uniform = space.uniform_within(budget)
    assert space.fill(uniform, budget) in {c.subnet for c in explorer.ask()}
    keys = []
    while candidates := explorer.ask():
        for candidate in candidates:
            space.validate(candidate.subnet)
            assert any(space.admits(candidate.subnet, b) for b in budgets)
            assert candidate.images == (16 if candidate.rung == 0 else 0)
            assert candidate.steps == (0, SMALL.tuning_steps, SMALL.final_steps)[candidate.rung]
        keys += [c.key for c in candidates]
        explorer.tell({c.key: made_up(c) for c in candidates})
    assert len(keys) == len(set(keys)) == len(explorer.scored)
    assert {s.subnet for s in explorer.scored if s.images == 0}
    assert space.admits(explorer.best(budget).subnet, budget)


def test_a_latency_budget_is_searched_like_any_other():
    space = make_space([24, 16], [8])
    slow = Term(10**9, (Extent(0, (("stage1", 1),)),))
    timed, budget = space.timed([slow, Term(10**9, ())]), Budget(latency=0.5)
    explorer = search(Explorer(timed, [budget], SMALL, 0))
    ranked = explorer.ranked(budget)
    assert ranked[0] == explorer.best(budget) and len(ranked) > SMALL.parents
    assert all(scored.cost.latency_s <= 0.5 * timed.cost().latency_s for scored in ranked)
    front = explorer.front()  # by what the budget bounds
    assert [s.cost.latency_s for s in front] == sorted({s.cost.latency_s for s in front})
    with pytest.raises(ValueError, match="bounds latency"):
        Explorer(space, [budget], SMALL, 0)


@settings(max_examples=12)
@given(spaces_with_budget(), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_the_order_of_tell_does_not_matter(drawn, seed, shuffler):
    space, budget = drawn
    plain = search(Explorer(space, [budget], SMALL, seed))
    other = Explorer(space, [budget], SMALL, seed)
    while candidates := other.ask():
        told = [(c.key, made_up(c)) for c in candidates]
        shuffler.shuffle(told)
        cut = shuffler.randrange(len(told) + 1)
        other.tell(dict(told[:cut]))  # in two parts, as workers finish
        other.tell(dict(told[cut:]))
    assert other.scored == plain.scored
    assert other.front() == plain.front()
    assert other.best(budget) == plain.best(budget)


@settings(max_examples=12)
@given(spaces_with_budget(), st.integers(0, 2**32))
def test_the_front_is_not_dominated_and_prices_are_right(drawn, seed):
    space, budget = drawn
    explorer = search(Explorer(space, [budget], SMALL, seed))
    front = explorer.front()
    prices = [s.cost.params if budget.macs is None else s.cost.macs for s in front]
    assert prices == sorted(set(prices))
    assert [s.score for s in front] == sorted((s.score for s in front), reverse=True)
    for scored in explorer.scored:
        assert scored.cost == space.cost(scored.subnet)


@settings(max_examples=12)
@given(spaces_with_budget(), st.integers(0, 2**32))
def test_as_it_is_only_what_leaves_much_of_the_budget_scores_better_than_the_best(drawn, seed):
    space, budget = drawn
    budgets = [budget, Budget(macs=1.0)]
    options = replace(SMALL, tuning_steps=0, finalists=0)
    explorer = search(
        Explorer(space, budgets, options, seed),
        lambda c: space.cost(c.subnet).macs + made_up(c),  # as slices can: the smallest is best
    )
    for each in budgets:
        best, ranked = explorer.best(each), explorer.ranked(each)
        uniform = space.fill(space.uniform_within(each), each)
        least = 0.9 * each.use(space.cost(uniform), of=space.cost())
        filled = [s for s in ranked if each.use(s.cost, of=space.cost()) >= least]
        assert filled and best == ranked[0] and ranked[: len(filled)] == filled
        for alike in (filled, ranked[len(filled) :]):
            keys = [(s.fidelity, s.score) for s in alike]
            assert keys == sorted(keys)
    between = Budget(macs=space.cost(explorer.ranked(budgets[1])[0].subnet).macs)
    assert explorer.ranked(between)[0] == explorer.best(between)


def test_evolution_beats_random_search_at_equal_cost():
    space = make_space([24] * 4, [24] * 4)
    budget = Budget(macs=0.3)
    wanted = space.sample(random.Random(99), budget)

    def distance(candidate: Candidate) -> float:
        subnet = candidate.subnet
        gaps = (abs(subnet.widths[a.name] - wanted.widths[a.name]) for a in space.axes)
        return sum(gaps) + 10 * len(subnet.dropped ^ wanted.dropped)

    gains = []
    for seed in range(3):
        options = Exploration(generations=10, population=16, parents=8, promote=0.0)
        evolved = search(Explorer(space, [budget], options, seed), distance).best(budget).score
        rng = random.Random(seed)
        drawn = (Candidate(space.sample(rng, budget), 0, 0, 0) for _ in range(160))
        gains.append(min(map(distance, drawn)) - evolved)
    assert all(gain > 0 for gain in gains)


def test_another_seed_begins_with_other_candidates():
    space = make_space([24, 24], [24])
    explorers = [Explorer(space, [Budget(macs=0.5)], SMALL, seed) for seed in (0, 1)]
    first, other = ({c.subnet for c in explorer.ask()} for explorer in explorers)
    assert first != other


@pytest.mark.parametrize(("share", "made"), [(0.0, "mutate"), (1.0, "crossover")])
def test_offspring_are_made_as_asked(monkeypatch, share, made):
    called = set()
    for plain in (SearchSpace.mutate, SearchSpace.crossover):

        def counted(self, *given, plain=plain):
            called.add(plain.__name__)
            assert plain.__name__ == "crossover" or given[2] == 0.3
            return plain(self, *given)

        monkeypatch.setattr(SearchSpace, plain.__name__, counted)
    options = replace(SMALL, crossover=share, mutation=0.3)
    search(Explorer(make_space([24, 24], [24]), [Budget(macs=0.5)], options, 0))
    assert called == {made}


@pytest.mark.parametrize(
    ("larger", "finalists", "served"), [(0.52, 0, True), (0.9, 0, False), (0.9, 3, True)]
)
def test_a_candidate_of_one_budget_serves_another_if_it_uses_it_or_is_tuned(
    larger, finalists, served
):
    space = make_space([16, 16], [16])
    small, large = Budget(macs=0.5), Budget(macs=larger)
    tuned = SMALL.tuning_steps if finalists else 0
    options = replace(SMALL, tuning_steps=tuned, finalists=finalists)
    explorer = search(
        Explorer(space, [small, large], options, 0), lambda c: float(space.cost(c.subnet).macs)
    )
    assert (explorer.best(large) == explorer.best(small)) == served
    assert explorer.best(small).subnet in {s.subnet for s in explorer.ranked(large)}


def test_the_best_share_of_each_budget_is_promoted():
    space = make_space([24, 24], [24])
    options = Exploration(generations=1, population=16, promote=0.25, scoring_images=16)
    explorer = Explorer(space, [Budget(macs=0.2), Budget(macs=0.8)], options, 1)
    first = explorer.ask()
    scores = {c.key: made_up(c) for c in first}
    explorer.tell(scores)
    promoted = {c.subnet for c in explorer.ask()}
    assert all(c.images == 0 and c.rung == 1 for c in explorer.ask())
    for cohort in (first[:8], first[8:]):
        best = sorted(cohort, key=lambda c: scores[c.key])[:2]
        assert {c.subnet for c in cohort} & promoted == {c.subnet for c in best}


def test_a_score_on_all_images_goes_before_a_luckier_one_on_few():
    space = make_space([24, 24], [24])
    budget = Budget(macs=0.5)
    explorer = search(
        Explorer(space, [budget], SMALL, 2), lambda c: 0.1 if c.images else 1 + made_up(c)
    )
    assert explorer.best(budget).images == 0
    assert all(s.images == 0 for s in explorer.front())


@pytest.mark.parametrize("steps", [0, 5])
def test_few_held_out_images_are_scored_once_but_for_tuning(steps):
    space = make_space([16, 16], [])
    options = replace(SMALL, tuning_steps=steps, finalists=0)
    explorer = search(Explorer(space, [Budget(macs=0.5)], options, 0, held_out=16))
    assert {s.images for s in explorer.scored} == {0}
    times = Counter(s.subnet for s in explorer.scored)
    assert max(times.values()) == (2 if steps else 1)
    assert {s.steps for s in explorer.scored} == {0, steps}


def test_what_is_promoted_is_tuned_and_goes_before_the_rest():
    space = make_space([24, 24], [24])
    budget = Budget(macs=0.5)
    explorer = search(Explorer(space, [budget], SMALL, 2), lambda c: made_up(c) + c.steps)
    best = explorer.best(budget)
    assert best.steps == SMALL.final_steps and best.images == 0
    ranked = [s.steps for s in explorer.ranked(budget)]
    assert ranked == sorted(ranked, reverse=True)
    assert set(ranked) == {0, SMALL.tuning_steps, SMALL.final_steps}
    assert all(s.steps == SMALL.final_steps for s in explorer.front())
    times = Counter(s.steps for s in explorer.scored)
    promoted = SMALL.generations * SMALL.population * SMALL.promote
    assert times[SMALL.tuning_steps] == promoted
    assert times[SMALL.final_steps] == SMALL.finalists


def test_the_best_of_each_budget_are_scored_once_more_in_the_end():
    space = make_space([24, 24], [24])
    budgets = [Budget(macs=0.2), Budget(macs=0.8)]
    options = replace(SMALL, generations=2, finalists=2)
    explorer = Explorer(space, budgets, options, 1)
    while (asked := explorer.ask())[0].rung < 2:
        explorer.tell({c.key: made_up(c) for c in asked})
    assert {c.generation for c in asked} == {2} and {c.images for c in asked} == {0}
    best = {s.subnet for budget in budgets for s in explorer.ranked(budget)[:2]}
    assert {c.subnet for c in asked} == best and len(asked) == len(best)
    # the last word is theirs, though it turns the order of the smaller budget's two around
    first, second = explorer.ranked(budgets[0])[:2]
    explorer.tell({c.key: 8.0 if c.subnet == second.subnet else 9.0 for c in asked})
    assert explorer.ask() == []
    assert explorer.best(budgets[0]).subnet == second.subnet
    assert explorer.ranked(budgets[0])[1].subnet == first.subnet


def test_a_finalist_that_diverges_leaves_its_place_to_another():
    space = make_space([24, 24], [24])
    budget = Budget(macs=0.5)
    explorer = Explorer(space, [budget], SMALL, 1)
    while (asked := explorer.ask())[0].rung < 2:
        explorer.tell({c.key: made_up(c) for c in asked})
    explorer.tell({c.key: float("nan") if n else 9.0 for n, c in enumerate(asked)})
    assert explorer.best(budget).subnet == asked[0].subnet


def test_where_all_tuning_diverges_the_others_are_left():
    space = make_space([24, 24], [24])
    budget = Budget(macs=0.5)
    explorer = search(
        Explorer(space, [budget], SMALL, 2), lambda c: float("nan") if c.steps else made_up(c)
    )
    best = explorer.best(budget)
    assert not best.steps and best.score < float("inf")
    assert explorer.front()


@pytest.mark.parametrize("at_once", [True, False])
def test_where_all_parents_diverge_those_that_they_displaced_are_left(at_once):
    """Two parents, and of the four that are promoted each diverges."""
    space = make_space([24, 24], [24])
    budget = Budget(macs=0.5)
    options = replace(SMALL, parents=2, promote=0.5, tuning_steps=5, finalists=0)
    explorer = Explorer(space, [budget], options, 2)
    while candidates := explorer.ask():
        scores = {c.key: float("nan") if c.steps else made_up(c) for c in candidates}
        for told in [scores] if at_once else [{key: score} for key, score in scores.items()]:
            explorer.tell(told)
            assert explorer.best(budget) == explorer.ranked(budget)[0]
    assert len(explorer.ranked(budget)) == SMALL.generations * SMALL.population / 2


def test_without_tuning_what_is_promoted_is_scored_as_it_is():
    space = make_space([24, 24], [24])
    options = replace(SMALL, tuning_steps=0, finalists=0)
    explorer = search(Explorer(space, [Budget(macs=0.5)], options, 2))
    assert not any(s.steps for s in explorer.scored)
    assert all(s.images == 0 for s in explorer.front())


def test_a_tiny_space_is_exhausted_without_repeating():
    space = make_space([3], [])
    explorer = search(Explorer(space, [Budget(macs=1.0)], SMALL, 0))
    assert len({s.subnet for s in explorer.scored}) <= 3
    assert explorer.ask() == []


def test_finalists_are_scored_where_generations_have_nothing_new():
    space = make_space([6, 6], [])
    budget = Budget(macs=0.5)
    options = replace(SMALL, generations=6, finalists=2)
    explorer = search(Explorer(space, [budget], options, 0), lambda c: made_up(c) - c.steps)
    bred = Counter(s.generation for s in explorer.scored if s.steps == 0)
    assert set(bred) < set(range(options.generations))  # or nothing is shown here
    last = [s for s in explorer.scored if s.steps == options.final_steps]
    assert len(last) == 2 and {s.generation for s in last} == {options.generations}
    assert explorer.best(budget) in last


def test_asking_twice_changes_nothing_and_resuming_replays():
    space = make_space([16, 16], [16])
    budgets = [Budget(macs=0.3), Budget(params=0.6)]
    whole = Explorer(space, budgets, SMALL, 5)
    kept: dict[str, float] = {}
    while candidates := whole.ask():
        assert whole.ask() == candidates
        kept |= {c.key: made_up(c) for c in candidates}
        whole.tell({c.key: kept[c.key] for c in candidates})
    again = Explorer(space, budgets, SMALL, 5)
    while candidates := again.ask():
        again.tell({c.key: kept[c.key] for c in candidates})
    assert again.scored == whole.scored


def test_scores_that_are_not_numbers_are_the_worst():
    space = make_space([16, 16], [16])
    budget = Budget(macs=0.5)
    odd = itertools.cycle([float("nan"), 1.0])
    explorer = search(Explorer(space, [budget], SMALL, 0), lambda c: next(odd))
    assert explorer.best(budget).score == 1.0
    hopeless = search(Explorer(space, [budget], SMALL, 0), lambda c: float("nan"))
    with pytest.raises(RunError, match=r"no candidate within the budget 0\.5 has a finite score"):
        hopeless.best(budget)
    assert hopeless.front() == []


def test_mistakes_are_named():
    space = make_space([16, 16], [16])
    with pytest.raises(ValueError, match="budgets is"):
        Explorer(space, [], SMALL, 0)
    with pytest.raises(BudgetError, match="cheapest"):
        Explorer(space, [Budget(macs=1)], SMALL, 0)
    with pytest.raises(ValueError, match="population is 1; expected at least one candidate"):
        Explorer(space, [Budget(macs=0.5), Budget(macs=0.2)], Exploration(population=1), 0)
    explorer = Explorer(space, [Budget(macs=0.5)], SMALL, 0)
    with pytest.raises(ValueError, match="keys of candidates asked for"):
        explorer.tell({"nobody": 1.0})
    assert len(explorer.scored) == 0
    with pytest.raises(BudgetError, match="none of the 0 scored candidates"):
        explorer.best(Budget(macs=0.5))


@pytest.mark.timeout(120)
def test_the_outcome_does_not_depend_on_the_hash_seed():
    program = (
        "from tests.method.test_explore import *\n"
        "space = make_space([16, 16], [16, 16])\n"
        "found = search(Explorer(space, [Budget(macs=0.3), Budget(macs=0.6)], SMALL, 7)).scored\n"
        "print([(s.subnet.id, s.score, s.images) for s in found])\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        ).stdout
        for seed in (1, 2)
    }
    assert len(outputs) == 1
