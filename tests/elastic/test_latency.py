import json
import math
import random

import pytest
import torch

from stp_ray.elastic import Budget, Subnet, Supernet
from stp_ray.elastic.latency import LatencyTable, Measured, fit, tabulate
from stp_ray.errors import BudgetError
from stp_ray.models import build_model


@pytest.fixture(scope="module")
def space():
    model = build_model("resnet20", num_classes=10, image_size=32)
    return Supernet.trace(model, torch.zeros(1, 3, 32, 32), divisor=4).space


class Device:
    """A made-up device: every layer has a rate of its own, works on vectors of 16 channels, and
    takes a while to be called; no two clocks say quite the same.

    Attributes:
        asked: the subnets that were measured.
    """

    def __init__(self, space, noise: float = 0.01) -> None:
        self._space, self._noise, self.asked = space, noise, []
        rng = random.Random(1)
        self._rates = [rng.uniform(0.5, 2) * 1e-11 for _ in space.terms]

    def true(self, subnet: Subnet) -> float:
        """Seconds, without noise."""
        seconds = 2e-5
        for rate, term in zip(self._rates, self._space.terms, strict=True):
            if not term.gates & subnet.dropped:
                lengths = [-(-e.at(subnet.widths) // 16) * 16 for e in term.extents]
                seconds += rate * term.coefficient * math.prod(lengths) + 3e-6
        return seconds

    def __call__(self, subnet: Subnet) -> float:
        self.asked.append(subnet)
        noise = random.Random(subnet.id).gauss(0, self._noise)
        return self.true(subnet) * (1 + noise)


def test_a_table_foretells_networks_that_were_not_measured(space):
    device = Device(space)
    budgets = [Budget(latency=0.4), Budget(macs=0.1)]
    table = tabulate(space, device, budgets, seed=0)
    assert table.networks[0].subnet == space.full == device.asked[0]
    assert len(device.asked) == len(set(device.asked)) == len(table.networks) <= 24
    timed, rng = space.timed(table.terms), random.Random(7)
    errors = []
    for _ in range(50):
        subnet = timed.sample(rng, budgets[0])
        errors.append(timed.cost(subnet).latency_s / device.true(subnet) - 1)
    assert math.sqrt(sum(e * e for e in errors) / len(errors)) < 0.05
    assert table.error < 0.08
    # and with a device that takes as long for every multiply-accumulate this is far off
    macs = [space.cost(m.subnet).macs / m.seconds for m in table.networks]
    assert max(macs) > 2 * min(macs)


def test_the_same_clocks_give_the_same_table_and_it_survives_json(space):
    budgets = [Budget(latency_ms=0.3, params=0.9)]
    one, other = (tabulate(space, Device(space), budgets, seed=3) for _ in range(2))
    assert one == other
    assert LatencyTable.from_content(json.loads(json.dumps(one.to_content()))) == one
    assert tabulate(space, Device(space), budgets, seed=4).networks != one.networks


@pytest.mark.parametrize("content", [{}, {"terms": [{}]}, {"terms": 3}, {"terms": [], "error": 0}])
def test_what_is_no_table_is_refused(content):
    with pytest.raises(ValueError, match=r"not a latency table .*; expected terms, networks and"):
        LatencyTable.from_content(content)


def test_a_budget_that_cannot_be_met_is_known_when_the_table_is(space):
    with pytest.raises(BudgetError, match=r"no subnet keeps the budget latency-0\.01: .* ms"):
        tabulate(space, Device(space), [Budget(latency=0.01)], seed=0)


def test_terms_are_positive_whatever_the_clock_says(space):
    rng = random.Random(0)
    subnets = [space.full, space.smallest, *(space.sample(rng) for _ in range(12))]
    terms = fit(space, [Measured(subnet, rng.uniform(0.001, 0.002)) for subnet in subnets])
    assert terms and all(term.coefficient > 0 for term in terms)
    timed = space.timed(terms)
    assert 0 < timed.cost(space.smallest).latency_s < timed.cost().latency_s
