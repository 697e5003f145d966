import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stp_ray.data.split import Split, derive_seed, spread_rows, stratified_rows


@given(st.integers(1, 5000), st.floats(0.001, 1))
def test_held_out_rows_are_spread_over_the_whole_split(rows, share):
    count = max(1, int(rows * share))
    held = spread_rows(rows, count)
    assert len(held) == count
    assert (np.diff(held) > 0).all()
    assert held[0] >= 0 and held[-1] < rows
    # One in each stretch: the distance from an even spacing is at most one stretch.
    assert np.abs(held - np.arange(count) * rows / count).max() <= rows / count + 1


def test_held_out_rows_never_change():
    assert spread_rows(1000, 4).tolist() == [20, 343, 568, 993]
    assert stratified_rows(np.arange(20) % 3, 5, seed=0).tolist() == [1, 5, 6, 9, 19]


@given(st.lists(st.integers(0, 4), min_size=20, max_size=300), st.integers(0, 3))
def test_a_stratified_choice_keeps_the_class_shares(labels, seed):
    labels = np.array(labels)
    count = len(labels) // 4
    chosen = stratified_rows(labels, count, seed)
    assert len(np.unique(chosen)) == count
    share = np.bincount(labels, minlength=5) * count / len(labels)
    assert np.abs(np.bincount(labels[chosen], minlength=5) - share).max() <= 1.0 + 1e-9


def test_seeds_depend_on_every_part():
    seeds = {derive_seed("a", i, j) for i in range(5) for j in range(5)}
    assert len(seeds) == 25
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed("a", 1, 2) == 3488550895278122847


def test_a_sample_comes_from_all_over_a_split():
    split = Split(np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1), np.repeat(np.arange(4), 10))
    sample = split.sample(8)
    assert np.bincount(sample.labels).tolist() == [2, 2, 2, 2]
    assert (split.labels[sample.images[:, 0, 0, 0]] == sample.labels).all()
    assert split.sample(40) is split
