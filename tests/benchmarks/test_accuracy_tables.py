"""What the tables of the comparison say of lines whose differences are known."""

import json
from dataclasses import replace

import pytest

OURS, TAUGHT = "stp", "stp, taught, four subnets a step"
QUARTER = f"{TAUGHT}, a quarter, restart"
AROUND = {"device": "a device", "threads": 1, "torch": "2", "revision": "abc"}


def line(seed: int, method: str, top1: float, budget: float = 0.15, **more: object) -> str:
    return json.dumps(
        {
            "seed": seed, "method": method, "budget": budget, "equal": "epochs", "top1": top1,
            "training_macs": 10, "macs": 1, "full_macs": 10, "main_top1": 71.0, **AROUND, **more,
        }
    )  # fmt: skip


@pytest.fixture
def tables(tmp_path, on_path):
    """The rows of the tables of differences by title, of a comparison of two seeds."""
    from accuracy_tables import section

    lines = [line(seed, "dense", 70.0 + seed, 1.0) for seed in (0, 1)]
    for seed, best in ((0, 60.0), (1, 64.0)):
        lines += [
            line(seed, OURS, 59.0),
            line(seed, f"{OURS}, uniform widths", 57.0),
            line(seed, QUARTER, 65.0),
            line(seed, f"{QUARTER}, no expansion", 64.5 - seed),
            line(seed, f"{QUARTER}, two rungs", 64.0),
            line(seed, f"{QUARTER}, uniform widths", 63.0 - seed),
            line(seed, f"{QUARTER}, tuned scores", 65.5),
            line(seed, "scratch", best),
            line(seed, "scratch + distillation, shape of a quarter", 62.0),
            line(seed, "scratch at uniform widths", 57.0),
            line(seed, "scratch + distillation at uniform widths", 60.5 + seed),
            line(seed, "scratch", 66.0, equal="macs"),
        ]
    (tmp_path / "cifar10_resnet20_cpu.jsonl").write_text("\n".join(lines))
    found, title = {}, ""
    for text in section(tmp_path, tmp_path):
        if text.endswith(":"):
            title = text.removesuffix(", differences within a seed:")
        elif text.startswith("|"):
            found.setdefault(title, []).append(text)
    return found


def test_the_best_of_the_others_is_picked_in_each_seed(tables):
    # 65 - 62 and 65 - 64
    assert (
        "| minus the best of all others in each seed | +2.00 ± 1.41 (2) |"
        in tables[f"`{QUARTER}`, equal epochs"]
    )


def test_a_part_or_an_option_is_compared_with_the_method_that_it_changes(tables):
    quarter, ours = tables[f"`{QUARTER}`, equal epochs"], tables[f"`{OURS}`, equal epochs"]
    assert f"| minus {QUARTER}, no expansion | +1.00 ± 0.71 (2) |" in quarter
    assert f"| minus {QUARTER}, two rungs | +1.00 ± 0.00 (2) |" in quarter
    assert f"| minus {OURS}, uniform widths | +2.00 ± 0.00 (2) |" in ours
    assert not any("two rungs" in row for row in ours)
    assert not any("no expansion" in row for row in ours)
    assert not any(f"{OURS}, uniform widths" in row for row in quarter)
    assert any("minus scratch at uniform widths" in row for row in quarter)


def test_a_shape_from_scratch_is_compared_with_the_method_that_found_it(tables):
    own = "scratch + distillation, shape of a quarter"
    assert f"| minus {own} | +3.00 ± 0.00 (2) |" in tables[f"`{QUARTER}`, equal epochs"]
    assert not any(own in row for row in tables[f"`{OURS}`, equal epochs"])


def test_shapes_that_were_found_are_compared_with_those_that_nobody_finds(tables):
    # 60 - 57 and 64 - 57
    found = tables["What STP's shapes are worth: `scratch`"]
    assert found[2:] == ["| minus scratch at uniform widths | +5.00 ± 2.83 (2) |"]
    assert not any("scratch + distillation`" in title for title in tables if "worth" in title)
    # 62 - 60.5 and 62 - 61.5
    taught = tables["What STP's shapes are worth: `scratch + distillation, shape of a quarter`"]
    assert taught[2:] == ["| minus scratch + distillation at uniform widths | +1.00 ± 0.71 (2) |"]


def test_a_better_search_is_compared_with_no_search(tables):
    rows = tables[f"`{QUARTER}, tuned scores`, equal epochs"]
    assert f"| minus {QUARTER} | +0.50 ± 0.00 (2) |" in rows
    assert f"| minus {QUARTER}, uniform widths | +3.00 ± 0.71 (2) |" in rows
    assert not any("random subnet" in row for row in rows), "which was not run"


def test_the_two_accounts_stay_apart(tables):
    assert "| minus scratch | -7.00 ± 0.00 (2) |" in tables[f"`{OURS}`, equal MACs"]
    assert "| minus scratch | -3.00 ± 2.83 (2) |" in tables[f"`{OURS}`, equal epochs"]


def test_a_method_that_was_not_run_has_no_table(tables):
    assert f"`{TAUGHT}`, equal epochs" not in tables


def test_the_share_of_the_macs_that_is_left_is_told_of_every_pruned_network(tables):
    rows = tables["MACs that are left, % of the dense network's:"]
    assert f"| {QUARTER} | 10.00 ± 0.00 (2) |" in rows
    assert not any(row.startswith("| dense |") for row in rows)


def test_norms_are_told_beside_those_of_the_same_slice_in_dense_training(on_path):
    from accuracy import PROTOCOLS
    from accuracy_tables import _norms_table

    def course(kept, dropped):
        return [
            {"kept_norm": 2.0, "dropped_norm": 2.0, "ratio": 1.0},
            {"kept_norm": 2.2, "dropped_norm": 2.0, "ratio": 1.1},
            {"kept_norm": kept, "dropped_norm": dropped, "ratio": kept / dropped},
        ]

    norms = {"sparsity": course(3.0, 1.0), "dense_sparsity": course(1.5, 1.5)}
    penalty = {"sparsity": course(0.2, 0.001)}
    lines = [
        json.loads(text)
        for text in (
            line(0, QUARTER, 60.0, **norms),
            line(0, QUARTER, 60.0, 0.05, **norms),
            line(0, "group lasso", 50.0, **penalty),
        )
    ]
    protocol = replace(PROTOCOLS["cifar10_resnet20_cpu"], epochs=4)  # one of them stimulative
    assert _norms_table(lines, protocol)[2:-1] == [
        f"| {QUARTER} | 0.15 | 1.50 (1) | 0.50 (1) | 1.10 (1) | 3.00 (1) |",
        f"| {QUARTER} | 0.05 | 1.50 (1) | 0.50 (1) | 1.10 (1) | 3.00 (1) |",
        "| group lasso | 0.15 | 0.10 (1) | 0.00 (1) | – | over 100 |",
        "| dense, the same slice | 0.15 | 0.75 (1) | 0.75 (1) | – | 1.00 (1) |",
        "| dense, the same slice | 0.05 | 0.75 (1) | 0.75 (1) | – | 1.00 (1) |",
    ]


def test_who_starts_from_the_teacher_is_compared_with_who_does_so_too(tmp_path, on_path):
    from accuracy_tables import section
    from contenders import STARTED, TUNED

    pruned = {TUNED: 65.0, STARTED: 67.0, "scratch": 62.0}
    lines = [line(0, "dense", 70.0, 1.0), line(0, "torch-pruning, even, of the teacher", 66.0)]
    lines += [line(0, method, top1) for method, top1 in pruned.items()]
    lines += [line(0, "dense + distillation", 71.5, 1.0)]
    (tmp_path / "cifar10_resnet20_cpu.jsonl").write_text("\n".join(lines))
    page = section(tmp_path, tmp_path)
    best = [text for text in page if text.startswith("| minus the best of all others")]
    assert [text.split(" | ")[1] for text in best] == ["+3.00 (1) |", "+1.00 (1) |"]
    assert "| main network at the end, minus dense + distillation | -0.50 (1) |" in page
    shares = page[page.index("MACs that are left, % of the dense network's:") :]
    assert not any("dense + distillation" in text for text in shares[: shares.index("", 2)])


def test_plots_show_the_form_that_was_measured_most_often(on_path):
    from accuracy_tables import _lead
    from contenders import TUNED

    lines = [{"method": method} for method in (TUNED, QUARTER, "scratch", "scratch", TUNED)]
    assert _lead(lines) == TUNED
    assert _lead(lines[:4]) == QUARTER


def test_searches_that_were_repeated_are_shown_seed_by_seed(tmp_path, on_path):
    from accuracy_tables import section
    from contenders import AGAIN, DENSE_TWICE, FILLED, STARTED_FINALS

    lines = []
    for seed, tops in ((3, (64.0, 63.0, 62.0)), (4, (62.0, 62.5, 61.0)), (5, (70.0, 70.0))):
        lines += [
            line(seed, "dense", 60.0),
            line(seed, DENSE_TWICE, 70.0),
            line(seed, FILLED, 61.5),
        ]
        lines += [
            line(seed, m, top1) for m, top1 in zip((STARTED_FINALS, *AGAIN), tops, strict=False)
        ]
    (tmp_path / "cifar10_resnet20_fresh.jsonl").write_text("\n".join(lines))
    page = section(tmp_path, tmp_path)
    start = next(at for at, text in enumerate(page) if text.startswith("Three searches"))
    assert page[start + 4 : start + 6] == [
        "| 0.15 | 3 | 64.00 | 63.00 | 62.00 | 2.00 | 63.00 | 1.50 | 105.00 | 90.00 |",
        "| 0.15 | 4 | 62.00 | 62.50 | 61.00 | 1.50 | 61.83 | 0.33 | 103.06 | 88.33 |",
    ]
    # seed 5 lacks a search
    assert page[start + 6].startswith("| 0.15 | all | 63.00 ± 1.41 (2) |")
