from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stp_ray.elastic.dims import Atom, Dim, Dims, constant, length, merge

#: Pieces of a dimension: (units, elements per unit), or a constant number of elements.
pieces = st.lists(
    st.one_of(st.tuples(st.integers(1, 6), st.integers(1, 4)), st.integers(1, 6)),
    min_size=1,
    max_size=4,
)


def build(dims: Dims, parts: list[tuple[int, int] | int]) -> Dim:
    """A dimension laid end to end from fresh variables and constants."""
    atoms: Dim = ()
    for part in parts:
        atoms += constant(part) if isinstance(part, int) else dims.fresh(part[0], factor=part[1])
    return dims.produced(atoms, f"layer{len(atoms)}")


def padded(dims: Dims, dim: Dim, total: int) -> Dim:
    return dim if length(dim) == total else (*dim, *dims.fresh(total - length(dim)))


def is_whole(dim: Dim) -> bool:
    """Every atom of a variable has the length that its units and factor say."""
    return all(
        atom.length == (atom.variable.size * atom.factor if atom.variable else atom.length)
        for atom in dim
    )


@given(pieces, pieces)
def test_unified_dimensions_are_equal_and_as_long_as_before(one, other):
    dims = Dims()
    a, b = build(dims, one), build(dims, other)
    total = max(length(a), length(b))
    a, b = padded(dims, a, total), padded(dims, b, total)
    found = dims.unify(a, b, "here")
    assert length(found) == length(dims.resolve(a)) == length(dims.resolve(b)) == total
    assert dims.resolve(a) == dims.resolve(b) == found
    assert is_whole(found)
    assert dims.unify(b, a, "again") == found
    assert dims.resolve(found) == found


@given(pieces, pieces, pieces)
def test_three_dimensions_agree_in_whatever_order_they_meet(one, other, third):
    for turn in range(3):
        dims = Dims()
        three = [build(dims, parts) for parts in (one, other, third)]
        total = max(map(length, three))
        three = [padded(dims, dim, total) for dim in three]
        three = three[turn:] + three[:turn]
        dims.unify(three[0], three[1], "first")
        dims.unify(three[1], three[2], "second")
        resolved = [dims.resolve(dim) for dim in three]
        assert resolved[0] == resolved[1] == resolved[2]
        assert length(resolved[0]) == total
        assert is_whole(resolved[0])


@given(pieces, st.integers(1, 5))
def test_coarse_dimensions_move_in_whole_steps(parts, factor):
    dims = Dims()
    dim = build(dims, parts)
    dims.coarsen(dim, factor, "heads", unit="heads")
    resolved = dims.resolve(dim)
    assert length(resolved) == length(dim)
    for atom in resolved:
        assert atom.variable is None or atom.factor % factor == 0


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 3))
def test_neighbours_merge_row_major(lengths, place, factor):
    dims = Dims()
    place %= len(lengths)
    parts = [constant(size) for size in lengths]
    parts[place] = dims.fresh(lengths[place], factor=factor)
    merged = merge(parts)
    assert merged is not None
    assert length(merged) == prod(map(length, parts))
    # keeping the first units is keeping the same elements before and after
    (atom,) = parts[place]
    if atom.variable is None:
        return
    for units in range(atom.variable.size + 1):
        kept_before = {
            (outer, k, inner)
            for outer in range(prod(lengths[:place]))
            for k in range(units * factor)
            for inner in range(prod(lengths[place + 1 :]))
        }
        inner_size = prod(lengths[place + 1 :])
        flat = {(o * atom.length + k) * inner_size + i for o, k, i in kept_before}
        kept, start = set(), 0
        for part in merged:
            kept |= set(range(start, start + units * part.factor))
            start += part.length
        assert kept == flat


def test_two_elastic_neighbours_do_not_merge():
    dims = Dims()
    assert merge([dims.fresh(4), dims.fresh(4)]) is None
    assert merge([constant(2), constant(3)]) == constant(6)


def test_equal_widths_become_one_variable_and_one_axis():
    dims = Dims()
    a = dims.produced(dims.fresh(8), "one")
    b = dims.produced(dims.fresh(8), "two")
    ((atom),) = dims.unify(a, b, "add")
    assert atom.variable is not None
    assert dims.producers(atom.variable) == ["one", "two"]
    assert dims.frozen == []


def test_a_concatenation_splits_what_reads_it():
    dims = Dims()
    parts = (*dims.fresh(6), *dims.fresh(4))
    reader = dims.fresh(10)
    found = dims.unify(reader, parts, "reads")
    assert [atom.length for atom in found] == [6, 4]
    assert all(atom.variable for atom in found)


def test_units_of_different_size_meet_in_their_least_common_multiple():
    dims = Dims()
    found = dims.unify(dims.fresh(6, factor=2), dims.fresh(4, factor=3), "both")
    assert [(a.length, a.factor, a.variable.size) for a in found] == [(12, 6, 2)]
    assert [a.factor for a in dims.unify((*found, *constant(3)), dims.fresh(15), "more")] == [6, 1]


@pytest.mark.timeout(20)
def test_constants_of_other_lengths_side_by_side_agree():
    dims = Dims()
    parts = (*dims.fresh(6), *constant(3), *dims.fresh(2))
    assert dims.unify(constant(11), parts, "frozen") == constant(11)
    assert dims.is_constant(parts)


def test_what_cannot_agree_is_frozen_with_its_reason():
    dims = Dims()
    a = dims.produced(dims.fresh(8), "one")
    dims.unify(a, constant(8), "add at model.py:3")
    assert dims.is_constant(a)
    assert [(f.name, f.size, f.reason) for f in dims.frozen] == [("one", 8, "add at model.py:3")]
    dims.freeze([a], "again")
    assert len(dims.frozen) == 1
    with pytest.raises(ValueError, match="lengths 8 and 9 cannot be equal"):
        dims.unify(a, constant(9), "never")


def test_freezing_without_a_report_lists_nothing():
    dims = Dims()
    a = dims.produced(dims.fresh(8), "head")
    dims.freeze([a], "network output", report=False)
    assert dims.is_constant(a) and dims.frozen == []


def test_constants_merge_when_resolved():
    dims = Dims()
    assert dims.resolve((Atom(2), Atom(3))) == constant(5)
    assert dims.fresh(1) == constant(1)
