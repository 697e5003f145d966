"""How candidates are handed out to the workers that score them."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from stp_ray.artifacts import Store
from stp_ray.elastic import Budget
from stp_ray.method import Exploration, Explorer
from stp_ray.stages.explore import _Search
from stp_ray.tracking import MultiTracker
from tests.method.spaces import make_space

sizes = st.integers(1, 20)


@settings(deadline=None, max_examples=30)
@given(population=st.integers(4, 40), most=sizes, workers=sizes)
def test_workers_get_about_as_much_in_as_few_turns_as_there_can_be(population, most, workers):
    space, options = make_space([24, 16], [8]), Exploration(population=population, parents=2)
    explorer = Explorer(space, [Budget(macs=0.9)], options, 0)
    waiting = len(explorer.ask())
    search = _Search(explorer, Store("memory://"), most, MultiTracker([]), workers)
    batches = list(iter(search.take, []))
    lengths = [len(batch) for batch in batches]
    assert sum(lengths) == len({c.key for batch in batches for c in batch}) == waiting
    assert max(lengths) <= most
    turns = math.ceil(waiting / (workers * most))
    assert math.ceil(len(batches) / workers) == turns
    assert max(lengths) == math.ceil(waiting / (workers * turns))
