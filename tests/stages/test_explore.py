"""How candidates are handed out to the workers that score them."""

import math
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.search import Searcher

from stp_ray.artifacts import Store
from stp_ray.elastic import Budget
from stp_ray.errors import StorageError
from stp_ray.method import Exploration, Explorer
from stp_ray.stages.explore import _Generations, _Search
from stp_ray.tracking import MultiTracker
from tests.method.spaces import make_space

sizes = st.integers(1, 20)


@settings(deadline=None, max_examples=30)
@given(population=st.integers(4, 40), most=sizes, workers=sizes)
def test_workers_get_about_as_much_in_as_few_turns_as_there_can_be(population, most, workers):
    space, options = make_space([24, 16], [8]), Exploration(population=population, parents=2)
    explorer = Explorer(space, [Budget(macs=0.9)], options, 0)
    waiting = len(explorer.ask())
    search = _Search(explorer, Store("memory://search"), most, MultiTracker([]), workers)
    batches = list(iter(search.take, []))
    lengths = [len(batch) for batch in batches]
    assert sum(lengths) == len({c.key for batch in batches for c in batch}) == waiting
    assert max(lengths) <= most
    turns = math.ceil(waiting / (workers * most))
    assert math.ceil(len(batches) / workers) == turns
    assert max(lengths) == math.ceil(waiting / (workers * turns))


def batches(failures, workers=4):
    """A search in batches of two, as Tune sees it."""
    space, options = make_space([24, 16], [8]), Exploration(population=16, parents=2)
    explorer = Explorer(space, [Budget(macs=0.9)], options, 0)
    search = _Search(explorer, Store(f"memory://{uuid.uuid4()}"), 2, MultiTracker([]), workers)
    return search, _Generations(search, workers, failures)


def test_a_machine_that_is_lost_with_all_its_workers_costs_each_batch_one_try():
    search, tune = batches(failures=1)
    names = [f"trial {i}" for i in range(4)]
    lost = [tune.suggest(name) for name in names]
    assert all(lost)
    for name in names:
        tune.on_trial_complete(name, error=True)
    assert not tune.gave_up()
    count = 0
    while search.open():  # and single losses all through a long search
        name = f"again {count}"
        suggested = tune.suggest(name)
        assert suggested
        count += 1
        scores = {"scores": [0.5] * len(suggested["candidates"])}
        if count % 9 == 8:
            tune.on_trial_complete(name, error=True)
        else:
            tune.on_trial_complete(name, scores)
    assert count > 16 and not tune.gave_up()


@pytest.mark.parametrize("failures", [0, 2])
def test_a_candidate_that_is_lost_again_and_again_ends_the_search(failures):
    search, tune = batches(failures, workers=1)
    (culprit, *_), lost, number = tune.suggest("0")["candidates"], 1, 0
    tune.on_trial_complete("0", error=True)
    while (suggested := tune.suggest(f"{number + 1}")) != Searcher.FINISHED:
        number += 1
        if culprit in suggested["candidates"]:
            lost += 1
            tune.on_trial_complete(f"{number}", error=True)
        else:
            scores = {"scores": [0.5] * len(suggested["candidates"])}
            tune.on_trial_complete(f"{number}", scores)
    assert lost == failures + 1
    assert tune.gave_up() and search.open()


def test_scores_that_cannot_be_kept_end_the_search(monkeypatch):
    search, tune = batches(failures=2)
    away = StorageError("cannot write: no space left")

    def full(*_):
        raise away

    monkeypatch.setattr(Store, "write_table", full)
    suggested = tune.suggest("0")
    tune.on_trial_complete("0", {"scores": [0.5] * len(suggested["candidates"])})
    assert tune.failure is away
    assert tune.suggest("1") == Searcher.FINISHED and search.open()


class Kept:
    """A tracker that keeps what is logged."""

    def __init__(self):
        self.logged = []

    def log(self, metrics, step):
        self.logged.append((step, metrics))


@pytest.mark.parametrize("finalists", [0, 2])
def test_the_best_score_of_a_generation_is_told_once_its_scores_are_final(finalists):
    options = Exploration(
        generations=2, population=8, parents=4, scoring_images=16, tuning_steps=3,
        finalists=finalists, final_steps=6,
    )  # fmt: skip
    budget, kept = Budget(macs=0.9), Kept()
    explorer = Explorer(make_space([24, 16], [8]), [budget], options, 0, held_out=32)
    search, final = _Search(explorer, Store(f"memory://{uuid.uuid4()}"), 4, kept), {}
    while batch := search.take():
        scores = {c.key: 10.0 - c.generation - c.steps for c in batch}  # the later, the better
        search.put(batch, scores)
        final[batch[0].generation + 1] = min(scores.values())
    assert [step for step, _ in kept.logged] == list(final)
    assert {step: metrics[f"best/{budget.label}"] for step, metrics in kept.logged} == final
