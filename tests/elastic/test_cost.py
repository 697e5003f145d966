import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stp_ray.elastic import Budget, Cost, SearchSpace, Subnet
from stp_ray.elastic.cost import CostTable, Extent, Term

from .networks import Written, supernet
from .same import assert_exact
from .spaces import spaces, tables


def recount(terms: list[Term], subnet: Subnet) -> int:
    """What a table of terms means, in plain Python."""
    return sum(
        term.coefficient * math.prod(extent.at(subnet.widths) for extent in term.extents)
        for term in terms
        if not term.gates & subnet.dropped
    )


@given(tables(), st.randoms(use_true_random=False))
def test_the_table_gives_what_a_recount_gives(parts, rng):
    axes, blocks, macs, params = parts
    space = SearchSpace(*parts)
    drawn = [
        Subnet(
            {axis.name: rng.choice(axis.choices) for axis in axes},
            [block.name for block in blocks if rng.random() < 0.5],
        )
        for _ in range(5)
    ]
    subnets = [*drawn, space.full, space.smallest]
    priced = space.costs(subnets)
    for subnet, cost in zip(subnets, priced, strict=True):
        assert (cost.macs, cost.params) == (recount(macs, subnet), recount(params, subnet))
        assert space.cost(subnet) == cost
        assert type(cost.macs) is int and cost.latency_s is None
    assert space.cost() == space.cost(space.full)
    assert space.costs([]) == []


@given(spaces)
def test_a_subnet_within_another_costs_no_more(space):
    small, half, full = (space.cost(s) for s in (space.smallest, space.uniform(0.5), space.full))
    assert small.macs <= half.macs <= full.macs
    assert small.params <= half.params <= full.params


def test_an_axis_that_a_dimension_holds_several_times_adds_up():
    extent = Extent(2, (("a", 3), ("a", 4)))
    table = CostTable(["a"], [], [Term(1, (extent,))], [])
    macs, params = table.price(np.array([[5]]), np.zeros((1, 0), dtype=np.int64))
    assert (macs.tolist(), params.tolist()) == ([extent.at({"a": 5})], [0]) == ([37], [0])


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_a_float_is_a_share_and_an_int_is_absolute(bound, full):
    of = Cost(full, full)
    share = min(bound, full) / full
    assert Budget(macs=share).limits(of) == (share * full, math.inf, math.inf)
    assert Budget(params=bound).limits(of) == (math.inf, bound, math.inf)
    assert Budget(macs=bound).admits(Cost(bound, 10**12), of)
    assert not Budget(macs=bound).admits(Cost(bound + 1, 0), of)
    assert Budget(macs=1.0, params=1.0).admits(of, of)
    assert not Budget(macs=1.0, params=1.0).admits(Cost(full, full + 1), of)


def test_a_share_admits_what_is_exactly_at_it():
    full = Cost(1000, 1000)
    assert Budget(macs=0.15).admits(Cost(150, 0), of=full)
    assert not Budget(macs=0.15).admits(Cost(151, 0), of=full)
    assert Budget(macs=1).admits(Cost(1, 0), of=full)
    assert not Budget(macs=1).admits(Cost(2, 0), of=full)


def test_latency_is_a_fraction_or_milliseconds():
    full = Cost(10, 10, latency_s=0.02)
    assert Budget(latency=0.25).limits(full) == (math.inf, math.inf, 0.005)
    assert Budget(latency_ms=4, macs=0.5).limits(full) == (5, math.inf, 0.004)
    assert Budget(latency=0.25).admits(Cost(10, 10, 0.005), of=full)
    assert not Budget(latency=0.25).admits(Cost(1, 1, 0.0051), of=full)
    assert not Budget(latency_ms=4, macs=0.5).admits(Cost(6, 1, 0.001), of=full)
    assert Budget(latency_ms=4, macs=0.5).counted == Budget(macs=0.5)
    assert Budget(latency=0.25).counted is None and Budget(latency=0.25).timed
    assert not Budget(macs=0.5).timed


def test_a_latency_budget_does_not_judge_a_cost_without_one():
    known, unknown = Cost(10, 10, 0.01), Cost(10, 10)
    for budget, cost, full in (
        (Budget(latency=0.5), known, unknown),
        (Budget(latency=0.5), unknown, known),
        (Budget(latency_ms=5), unknown, unknown),
    ):
        with pytest.raises(ValueError, match="bounds latency, which this cost does not hold"):
            budget.admits(cost, of=full)


def test_the_use_of_a_budget_is_the_largest_share_of_a_bound():
    full = Cost(100, 40, latency_s=0.02)
    assert Budget(macs=0.5).use(Cost(40, 40), of=full) == 0.8
    assert Budget(macs=0.5, params=20).use(Cost(10, 15), of=full) == 0.75
    assert Budget(macs=0.5, latency_ms=4).use(Cost(10, 40, 0.003), of=full) == 0.75
    assert Budget(latency=0.5).use(Cost(90, 40, 0.004), of=full) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="bounds latency, which this cost does not hold"):
        Budget(latency=0.5).use(Cost(10, 10), of=full)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({}, "bounds nothing; set macs or params"),
        ({"macs": 0}, r"macs=0: expected a fraction in \(0, 1\]"),
        ({"macs": 0.0}, "macs=0.0"),
        ({"macs": -0.5}, "macs=-0.5"),
        ({"macs": 1.5}, "macs=1.5"),
        ({"macs": -3}, "macs=-3"),
        ({"macs": True}, "macs=True"),
        ({"macs": float("nan")}, "macs=nan"),
        ({"macs": float("inf")}, "macs=inf"),
        ({"macs": 0.5, "params": 2.0}, "params=2.0"),
        ({"latency": 2}, "latency=2: expected a fraction .*; latency_ms takes milliseconds"),
        ({"latency": 1.5}, "latency=1.5"),
        ({"latency": 0.0}, "latency=0.0"),
        ({"latency_ms": -1.0}, "latency_ms=-1.0: expected a positive number of milliseconds"),
        ({"latency_ms": True}, "latency_ms=True"),
        ({"latency_ms": float("inf")}, "latency_ms=inf"),
        ({"latency_ms": float("nan")}, "latency_ms=nan"),
        ({"latency": 0.5, "latency_ms": 2.0}, "expected one of them; leave the other out"),
    ],
)
def test_a_budget_out_of_range_is_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        Budget(**bounds)


@pytest.mark.parametrize(
    ("bounds", "label"),
    [
        ({"macs": 0.15}, "0.15"),
        ({"macs": 1.0}, "1"),
        ({"macs": 1000}, "macs-1000"),
        ({"params": 0.3}, "params-0.3"),
        ({"params": 20}, "params-20"),
        ({"macs": 0.5, "params": 0.3}, "0.5-params-0.3"),
        ({"macs": 0.12345678}, "0.12345678"),
        ({"latency": 0.3}, "latency-0.3"),
        ({"latency_ms": 2.5}, "latency-2.5ms"),
        ({"latency_ms": 12}, "latency-12ms"),
        ({"latency_ms": 1e6}, "latency-1e06ms"),
        ({"latency_ms": 2.5e300}, "latency-2.5e300ms"),
        ({"macs": 0.5, "params": 0.3, "latency": 1.0}, "0.5-params-0.3-latency-1"),
    ],
)
def test_labels(bounds, label):
    assert Budget(**bounds).label == label


@given(
    st.sampled_from(["macs", "params"]),
    st.floats(0.001, 1) | st.integers(2, 10**9),
    st.floats(0.001, 1) | st.integers(2, 10**9),
)
def test_labels_tell_budgets_apart_and_are_file_names(kind, one, other):
    labels = [Budget(**{kind: bound}).label for bound in (one, other)]
    assert all(set(label) <= set("0123456789.-eabcdefghijklmnopqrstuvwxyz") for label in labels)
    assert (labels[0] == labels[1]) == ((type(one), one) == (type(other), other))


@torch.fx.wrap
def by_value(x):
    return x * (1 + x.sum().item() * 0)


def test_attention_is_priced_where_shapes_need_arithmetic():
    """Then torch would run it fused, where its counter sees nothing."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def tokens(m, x):
        return m.encoder(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)

    encoder = nn.TransformerEncoder(layer, 1)
    plain = supernet(Written(tokens, encoder=encoder))
    mixed = supernet(Written(lambda m, x: by_value(tokens(m, x)), encoder=encoder))
    assert mixed.cost().macs == plain.cost().macs > 30_000


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_over_tokens_that_shrink_is_priced_at_those_left(batch_first):
    def between(m, x):
        tokens = m.mix(x.flatten(2)).transpose(1, 2)  # [B, 10, 8]
        tokens = tokens if batch_first else tokens.transpose(0, 1)
        tokens = m.attention(tokens, tokens, tokens, need_weights=False)[0]
        return (tokens.transpose(1, 2) if batch_first else tokens.permute(1, 2, 0))[..., None]

    attention = nn.MultiheadAttention(8, 4, batch_first=batch_first)
    net = supernet(Written(between, mix=nn.Linear(64, 10), attention=attention))
    assert {"mix", "attention"} <= {axis.name for axis in net.space.axes}
    assert_exact(net)


@pytest.mark.parametrize("width", [1, 2])
def test_a_sum_over_one_element_is_no_product_of_matrices(width):
    def between(m, x):
        return x * torch.einsum("bchw,oc->bohw", m.few(x), m.weight)

    layers = {"few": nn.Conv2d(8, width, 1), "weight": nn.Parameter(torch.randn(8, width))}
    net = supernet(Written(between, **layers))
    assert_exact(net)


def test_windows_over_an_elastic_height_keep_it_whole():
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    def between(m, x):
        rows = m.rows(x.transpose(2, 3)).transpose(2, 3)  # another height
        return m.windows(rows.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    windows = ShiftedWindowAttention(8, [4, 4], [0, 0], 4)
    net = supernet(Written(between, rows=nn.Linear(8, 8), windows=windows))
    assert {axis.name for axis in net.space.axes} == {"stem", "windows", "windows.proj"}
    assert "attends over an elastic dimension" in net.frozen[0].reason
    assert_exact(net)
