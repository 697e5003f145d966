import copy
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stp_ray.elastic import Subnet

subnets = st.builds(
    Subnet,
    st.dictionaries(st.text(max_size=8), st.integers(0, 2**40), max_size=6),
    st.lists(st.text(max_size=8), max_size=4),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["widths", "dropped", "a"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(subnets)
def test_json_pickle_and_copies_give_the_same_subnet(subnet):
    for other in (
        Subnet.from_json(subnet.to_json()),
        pickle.loads(pickle.dumps(subnet)),
        copy.deepcopy(subnet),
        copy.copy(subnet),
    ):
        assert other == subnet
        assert hash(other) == hash(subnet)
        assert (other.id, other.to_json()) == (subnet.id, subnet.to_json())
        assert dict(other.widths) == dict(subnet.widths) and other.dropped == subnet.dropped
    assert json.loads(subnet.to_json())["widths"] == dict(subnet.widths)


@given(subnets, st.randoms(use_true_random=False))
def test_order_does_not_matter(subnet, rng):
    names, dropped = list(subnet.widths), list(subnet.dropped) * 2
    rng.shuffle(names)
    rng.shuffle(dropped)
    other = Subnet({name: subnet.widths[name] for name in names}, dropped)
    assert other == subnet and other.to_json() == subnet.to_json()


@given(subnets, subnets)
def test_different_subnets_differ(one, other):
    same = dict(one.widths) == dict(other.widths) and one.dropped == other.dropped
    assert (one == other) == same
    assert (one.to_json() == other.to_json()) == same
    assert (one.id == other.id) == same


@given(subnets)
def test_within_is_an_order(subnet):
    assert subnet.within(subnet)
    wider = Subnet({name: width + 1 for name, width in subnet.widths.items()})
    assert subnet.within(wider)
    assert not subnet.widths or not wider.within(subnet)
    assert subnet.within(Subnet(subnet.widths))
    assert not Subnet({**subnet.widths, "an axis of another space": 1}).within(subnet)


@given(json_values)
def test_other_json_is_refused_in_one_line(value):
    text = json.dumps(value)
    try:
        subnet = Subnet.from_json(text)
    except ValueError as error:
        assert "not a subnet" in str(error) and "\n" not in str(error)
    else:
        assert isinstance(value["dropped"], list)
        assert dict(subnet.widths) == value["widths"]
        assert set(subnet.dropped) == set(value["dropped"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"widths": {}}',
        '{"widths": {"a": 1.0}, "dropped": []}',
        '{"widths": {"a": true}, "dropped": []}',
        '{"widths": {"a": 1}, "dropped": "ab"}',
        '{"widths": {"a": 1}, "dropped": [1]}',
        '{"widths": {"a": 1}, "dropped": {"b": 1}}',
        '{"widths": {"a": 1}, "dropped": [], "more": 1}',
    ],
)
def test_what_is_not_a_subnet_says_what_is_expected(text):
    with pytest.raises(ValueError, match=r"not a subnet: .*; expected .*widths"):
        Subnet.from_json(text)


@pytest.mark.parametrize("value", [None, 3, {"widths": {}, "dropped": []}])
def test_what_is_no_text_is_no_json(value):
    with pytest.raises(ValueError, match=r"not a subnet: .*; expected .*widths"):
        Subnet.from_json(value)


def test_widths_are_integers_and_dropped_blocks_a_list():
    with pytest.raises(ValueError, match=r"widths are \{'a': 3\.7\}; expected .* integers"):
        Subnet({"a": 3.7})
    with pytest.raises(ValueError, match="dropped is 'layer1'; expected a list or a set"):
        Subnet({"a": 3}, "layer1")
    assert Subnet({"a": np.int64(3)}) == Subnet({"a": 3})


def test_a_subnet_cannot_be_changed():
    widths = {"a": 1}
    subnet = Subnet(widths, ["b"])
    widths["a"] = 2
    assert subnet.widths["a"] == 1
    with pytest.raises(TypeError):
        subnet.widths["a"] = 3
    with pytest.raises(AttributeError):
        subnet.dropped = frozenset()
    assert subnet != "subnet"


def test_text_and_id_are_the_same_in_every_process_and_version():
    subnet = Subnet({"layer1.0": 8, "fc": 3}, ["b", "a"])
    assert subnet.to_json() == '{"dropped":["a","b"],"widths":{"fc":3,"layer1.0":8}}'
    assert subnet.id == "1112cc9064c7"
