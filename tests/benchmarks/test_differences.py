"""Figures of comparisons, of lines of which they are known."""

import pytest


def line(seed, method, top1, budget=0.15, **more):
    return {"seed": seed, "method": method, "budget": budget, "top1": top1, **more}


def test_a_difference_is_taken_within_the_seeds_that_both_have(on_path):
    from differences import paired

    ours = [line(0, "stp", 61.0), line(1, "stp", 64.0), line(2, "stp", 70.0)]
    others = [line(1, "scratch", 62.0), line(0, "scratch", 60.0), line(3, "scratch", 1.0)]
    assert paired(ours, "stp", others, "scratch", 0.15) == [1.0, 2.0]
    assert paired(ours, "stp", others, "scratch", 0.05) == []


def test_the_dense_network_is_there_for_each_budget(on_path):
    from differences import paired

    lines = [line(0, "stp", 48.0, 0.05, main_top1=81.0), line(0, "dense", 80.0, 1.0)]
    assert paired(lines, "stp", lines, "dense", 0.05, ratio=True) == [60.0]
    assert paired(lines, "stp", lines, "dense", 0.05, key="main_top1") == [1.0]


def test_rivals_with_more_epochs_count_against_who_has_them_too(on_path):
    from contenders import STARTED, TUNED
    from differences import over_best

    lines = [line(0, TUNED, 62.0), line(0, STARTED, 64.0), line(0, "scratch", 60.0)]
    lines.append(line(0, "torch-pruning, even, of the teacher", 63.0))
    assert over_best(lines, TUNED, 0.15) == [2.0]
    assert over_best(lines, STARTED, 0.15) == [1.0]


def test_a_cost_is_over_the_dense_network_of_the_same_seed_at_equal_epochs(on_path):
    from differences import costs

    lines = [
        line(0, "dense", 80.0, 1.0, equal="epochs", training_macs=10),
        line(1, "dense", 80.0, 1.0, equal="epochs", training_macs=20),
        line(1, "dense", 82.0, equal="macs", training_macs=99),
        line(0, "scratch", 60.0, equal="epochs", training_macs=5),
        line(1, "scratch", 60.0, equal="epochs", training_macs=5),
        line(1, "scratch", 66.0, equal="macs", training_macs=40),
        line(2, "scratch", 60.0, equal="epochs", training_macs=5),
    ]
    assert costs(lines, "scratch", 0.15) == [0.5, 0.25]
    assert costs(lines, "dense", 0.15) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "sign", "text"),
    [
        ([], False, "–"),
        ([1.0], True, "+1.00 (1)"),
        ([1.0, 2.0], False, "1.50 ± 0.71 (2)"),
        ([97.0, 99.0], True, "98.00 ± 1.41 (2)"),
    ],
)
def test_a_spread_tells_how_many_it_is_of(values, sign, text, on_path):
    from differences import spread

    assert spread(values, sign=sign) == text
