"""What the front of the results says holds, of lines of which that is known."""

import json
from pathlib import Path

import pytest

FRESH = "cifar10_resnet20_fresh"


def rows(page):
    """The cells of a table, without its heading."""
    tables = [text for text in page if text.startswith("|")]
    return [[cell.strip() for cell in text.strip("|").split("|")] for text in tables[2:]]


@pytest.fixture
def verdicts(tmp_path, on_path):
    """The rows of lines that a test gives: aim, form, where, a cell for each budget, verdict."""
    from verdict_table import section

    def render(lines, shapes=(), place=FRESH):
        for folder, name, content in (
            ("accuracy", place, lines),
            ("proxy", "cifar10_resnet20_cpu", shapes),
        ):
            (tmp_path / folder).mkdir()
            text = "\n".join(json.dumps(line) for line in content)
            (tmp_path / folder / f"{name}.jsonl").write_text(text)
        page = section(tmp_path / "accuracy", tmp_path / "proxy")
        return rows(page[page.index("### Every form") :])

    return render


def line(seed, method, top1, budget=0.15, cost=10):
    return {
        "seed": seed, "method": method, "budget": budget, "equal": "epochs", "top1": top1,
        "training_macs": cost, "main_top1": 71.0,
    }  # fmt: skip


def test_an_aim_is_met_at_the_budgets_at_which_the_mean_reaches_it(verdicts):
    from contenders import TUNED

    lines = [line(seed, "dense", 70.0, 1.0) for seed in (3, 4, 5)]
    for seed in (3, 4, 5):
        for budget in (0.15, 0.05):
            lines.append(line(seed, TUNED, 62.75 + seed / 4, budget))
            lines.append(line(seed, "scratch", 62.0, budget))
    ahead, kept, main, cost = verdicts(lines)
    # one point is wanted at 0.15, two at 0.05
    assert ahead[1:3] == kept[1:3] == ["(d)", "ResNet-20, fresh seeds"]
    assert ahead[3:] == ["–", "–", "+1.75 ± 0.25 (3)", "+1.75 ± 0.25 (3)", "at 0.15"]
    assert kept[3:] == ["–", "–", "91.07 ± 0.36 (3)", "–", "no"]
    assert (main[-1], cost[-1]) == ("yes", "yes")


def test_an_aim_is_told_once(verdicts):
    from contenders import STARTED_FINALS, TUNED

    lines = [line(3, method, 62.0) for method in (TUNED, STARTED_FINALS)]
    first, second = verdicts([*lines, line(3, "torch-pruning, even, of the teacher", 61.0)])[-2:]
    assert first[:2] == ["the same over Torch-Pruning of the teacher", "(d)"]
    assert second[:2] == ["", "(f)"]


def test_a_part_has_to_be_worth_more_than_its_spread(verdicts):
    from contenders import STARTED

    lines = []
    for seed, (large, small) in ((3, (0.5, 0.0)), (4, (0.6, 0.4)), (5, (0.7, 1.1))):
        for budget, gain in ((0.15, large), (0.05, small)):
            lines.append(line(seed, STARTED, 60.0 + gain, budget))
            lines.append(line(seed, f"{STARTED}, no expansion", 60.0, budget))
    row, growing = verdicts(lines)
    assert row[3:] == ["–", "–", "+0.60 ± 0.10 (3)", "+0.50 ± 0.56 (3)", "at 0.15"]
    assert growing[3:] == ["–", "–", "–", "-0.10 ± 0.46 (3)", "no"]


def test_expansion_is_judged_on_one_shape(verdicts):
    from contenders import STARTED

    lines = []
    for seed, other in ((3, "wide"), (4, "narrow"), (5, "wide")):
        lines.append({**line(seed, STARTED, 61.0 + seed), "subnet": "wide"})
        lines.append({**line(seed, f"{STARTED}, no expansion", 60.0 + seed), "subnet": other})
    (row,) = verdicts(lines)
    assert row[5] == "+1.00 ± 0.00 (2)"


def test_a_found_shape_is_set_beside_the_uniform_one_of_its_supernet(verdicts):
    from contenders import TUNED

    shapes = [
        {"method": TUNED, "seed": seed, "budget": 0.05, "top1": top1, "how": how, "scores": {}}
        for seed, found, uniform in ((1, 60.0, 58.0), (2, 61.0, 58.0), (4, 59.0, None))
        for how, top1 in (("explored", found), ("random", 50.0), ("uniform", uniform))
        if top1
    ]
    (row,) = verdicts([], shapes)
    assert row[1:] == ["(d)", "ResNet-20", "–", "–", "–", "+2.50 ± 0.71 (2)", "(yes)"]


def test_one_seed_shows_nothing_of_a_part(verdicts):
    from contenders import STARTED

    lines = [line(3, STARTED, 61.0), line(3, f"{STARTED}, no expansion", 60.0)]
    (row,) = verdicts(lines)
    assert row[3:] == ["–", "–", "+1.00 (1)", "–", "(no)"]


def test_searches_of_a_seed_count_as_their_mean(verdicts):
    from contenders import AGAIN, STARTED, STARTED_FINALS

    lines = [line(seed, f"{STARTED}, filled uniform widths", 60.0) for seed in (3, 4, 5)]
    tops = {3: (61.0, 62.0, 60.0), 4: (60.0, 60.5, 61.0), 5: (70.0, 70.0)}
    for seed, found in tops.items():
        methods = (STARTED_FINALS, *AGAIN)
        lines += [line(seed, m, top1) for m, top1 in zip(methods, found, strict=False)]
    (row,) = [row for row in verdicts(lines) if "the mean of three" in row[2]]
    # seed 5 lacks a search
    assert row[3:] == ["–", "–", "+0.75 ± 0.35 (2)", "–", "(yes)"]


def test_costs_are_told_with_and_without_the_teacher(verdicts):
    from contenders import STARTED_FINALS

    rows = verdicts([line(3, "dense", 70.0, 1.0), line(3, STARTED_FINALS, 64.0, cost=29)])
    assert [(row[2], *row[5:]) for row in rows[-2:]] == [
        ("ResNet-20, fresh seeds, the teacher's training not counted", "1.90 (1)", "–", "(yes)"),
        ("ResNet-20, fresh seeds, all counted", "2.90 (1)", "–", "(no)"),
    ]


def test_at_equal_macs_others_get_what_ours_spent(verdicts):
    from contenders import OURS, QUARTER, TRIED
    from verdict_table import CHOSEN

    def spent(method, top1):
        return {**line(0, method, top1), "equal": "macs"}

    lines = [line(0, OURS, 58.0), spent("scratch", 68.0), spent(TRIED, 67.5)]
    lines += [line(0, "scratch", 57.0), line(0, TRIED, 56.0), line(0, QUARTER, 61.0)]
    rows = verdicts(lines, place=CHOSEN)
    assert [row[1:] for row in rows if "`scratch`" in row[2]] == [
        ["`stp`", "ResNet-20, `scratch`", "–", "–", "-10.00 (1)", "–", "(no)"],
        [f"`{TRIED}`", "ResNet-20, `scratch`", "–", "–", "-0.50 (1)", "–", "(no)"],
    ]


def test_norms_are_judged_by_how_they_grow(verdicts):
    from contenders import OURS
    from verdict_table import CHOSEN

    course = [{"ratio": 2.0, "dropped_norm": 4.0}, {"ratio": 3.0, "dropped_norm": 1.0}]
    lines = [{**line(seed, OURS, 58.0), "sparsity": course} for seed in (0, 1, 2)]
    ratio, held = verdicts(lines, place=CHOSEN)
    assert ratio[3:] == ["–", "–", "1.50 ± 0.00 (3)", "–", "yes"]
    assert held[3:] == ["–", "–", "0.25 ± 0.00 (3)", "–", "no"]


def test_every_row_has_figures_in_what_is_recorded(on_path):
    from verdict_table import OF_RECIPES, ROWS, SCORES, SHORT, SUPERNETS, section

    recorded = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    page = section(recorded / "accuracy", recorded / "proxy")
    at = page.index("### Every form")
    short, whole = rows(page[:at]), rows(page[at:])
    assert len(short) == len(SHORT) + 1 + len(OF_RECIPES)
    # scores: of all shapes, and of random ones
    assert len(whole) == len(ROWS) + len(SUPERNETS) + 2 * len(SCORES)


def test_scores_are_judged_by_how_they_rank(verdicts):
    from contenders import TUNED

    steps = "200 on 4096"
    shapes = [
        {"method": TUNED, "seed": 1, "budget": budget, "top1": top1, "how": how,
         "scores": {steps: score}}
        for budget, scores in ((0.15, (0.1, 0.2, 0.3)), (0.05, (0.1, 0.3, 0.2)))
        for top1, how, score in zip((62.0, 61.0, 60.0), ("explored", "random", "random"), scores,
                                    strict=True)
    ]  # fmt: skip
    others = [{**shapes[0], "seed": 0, "scores": {"0": 0.1}}]
    every, drawn = verdicts([], [*shapes, *others])
    assert every[1] == drawn[1] == "(d)"
    assert every[2].startswith("ResNet-20, seed 1, that of finalists")
    assert every[3:] == ["–", "–", "1.00 (1)", "0.33 (1)", "(at 0.15)"]
    assert drawn[3:] == ["–", "–", "1.00 (1)", "-1.00 (1)", "(at 0.15)"]


def test_verdicts_on_few_seeds_are_in_brackets(verdicts):
    from contenders import STARTED

    lines = []
    for seed in (3, 4, 5):
        for budget in (0.15, 0.05) if seed < 5 else (0.05,):
            lines.append(line(seed, STARTED, 61.0 + seed / 10, budget))
            lines.append(line(seed, f"{STARTED}, no expansion", 60.0, budget))
    expanded, growing = verdicts(lines)
    assert expanded[5:] == ["+1.35 ± 0.07 (2)", "+1.40 ± 0.10 (3)", "0.05: yes (0.15: yes)"]
    assert growing[3:] == ["–", "–", "–", "+0.00 ± 0.00 (2)", "(no)"]


def test_nothing_measured_says_nothing(tmp_path, on_path):
    from verdict_table import section

    assert section(tmp_path, tmp_path) == []
