"""What STP is to be worth and whether it is: the front of docs/results.md, from the lines that
`accuracy.py` and `proxy.py` have written."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contenders import (
    OURS,
    QUARTER,
    STARTED,
    STARTED_FINALS,
    TAUGHT,
    THEIRS,
    TRIED,
    TUNED,
)
from differences import dense_lines, over_best, paired, runs_of, spread
from filling import Line, read
from markdown_table import row
from proxy_table import tau

from stp_ray.method import Exploration

BUDGETS = (0.5, 0.3, 0.15, 0.05)
#: The letters that docs/method.md has for forms of STP.
LETTERS = {TAUGHT: "(b)", QUARTER: "(c)", TUNED: "(d)", STARTED: "(e)", STARTED_FINALS: "(f)"}
#: Comparisons, and what a table calls them.
FRESH, CHOSEN = "cifar10_resnet20_fresh", "cifar10_resnet20_cpu"
PLACES = {
    FRESH: "ResNet-20, fresh seeds",
    CHOSEN: "ResNet-20",
    "cifar10_resnet20_few": "ResNet-20, 2,000 images",
    "cifar10_mobilenet_v2_cpu": "MobileNetV2",
    "cifar10_vit_cpu": "ViT",
    "cifar10_resnet56": "ResNet-56, GPU",
}

#: (lines of a comparison, budget) -> a figure for each seed.
Ask = Callable[[list[Line], float], list[float]]


@dataclass(frozen=True)
class Aim:
    """Something that STP is to be worth.

    Args:
        text: what.
        least: budget -> the least that the mean over seeds has to be.
        most: whether that is the most instead.
        outside: whether the mean has to be away from it by more than one standard deviation.
    """

    text: str
    least: dict[float, float]
    most: bool = False
    outside: bool = False

    def met(self, figures: list[float], budget: float) -> bool:
        away = statistics.mean(figures) - self.least[budget]
        away = -away if self.most else away
        if self.outside:  # one seed alone has no spread to be outside of
            return len(figures) > 1 and away > statistics.stdev(figures)
        return away >= 0


#: Aim, form, where and against what, and the figures at each budget.
Verdict = tuple[Aim, str, str, dict[float, list[float]]]


def _everywhere(value: float) -> dict[float, float]:
    return dict.fromkeys(BUDGETS, value)


def _ahead(form: str) -> Ask:
    return lambda lines, b: over_best(_epochs(lines), form, b)


def _minus(form: str, other: str, key: str = "top1") -> Ask:
    return lambda lines, b: paired(_epochs(lines), form, _epochs(lines), other, b, key=key)


def _kept(form: str) -> Ask:
    return lambda lines, b: paired(_epochs(lines), form, _epochs(lines), "dense", b, ratio=True)


def _at_equal_macs(form: str, other: str) -> Ask:
    def ask(lines: list[Line], budget: float) -> list[float]:
        macs = [line for line in lines if line["equal"] == "macs"]
        return paired(macs, form, macs, other, budget)

    return ask


def _cost(form: str, gift: int) -> Ask:
    """Over the dense network's epochs, without `gift` of them."""

    def ask(lines: list[Line], budget: float) -> list[float]:
        base = {line["seed"]: line["training_macs"] for line in dense_lines(lines)}
        runs = runs_of(_epochs(lines), form, budget)
        runs = [line for line in runs if line["seed"] in base]
        return [line["training_macs"] / base[line["seed"]] - gift for line in runs]

    return ask


def _grown(form: str, key: str) -> Ask:
    """What a norm, or the ratio of both, is in the end over what it was at first."""

    def ask(lines: list[Line], budget: float) -> list[float]:
        runs = [line["sparsity"] for line in runs_of(_epochs(lines), form, budget)]
        return [run[-1][key] / run[0][key] for run in runs]

    return ask


def _epochs(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line["equal"] == "epochs"]


AHEAD = Aim(
    "ahead of the best of all others in each seed, at equal epochs, by 1 point at 0.15 and 2 at "
    "0.05, and not behind at 0.5 and 0.3",
    {0.5: 0.0, 0.3: 0.0, 0.15: 1.0, 0.05: 2.0},
)
KEPT = Aim("keeps 97 % of the dense network's top-1 at 0.15", {0.15: 97.0})
LEVEL = Aim("not behind any other at equal multiplications of training", {0.15: 0.0, 0.05: 0.0})
RATIO = Aim("kept weights grow over dropped ones", _everywhere(1.0), outside=True)
HELD = Aim("dropped weights keep their magnitude", _everywhere(1.0))
FOUND = Aim("a found shape is ahead of uniform widths", _everywhere(0.0), outside=True)
EXPANDED = Aim("expansion is ahead of distilling directly", _everywhere(0.0), outside=True)
MAIN = Aim("the main network is not below dense training", _everywhere(0.0))
COST = Aim("costs at most two dense trainings at 0.15", {0.15: 2.0}, most=True)
TAU = Aim("the score ranks as the accuracy does: Kendall's tau 0.6", _everywhere(0.6))

#: What else a form that starts as the teacher is compared with.
TWICE, HALF = "others for twice the epochs", "others for half the epochs but for Torch-Pruning"

#: Aim, form, where and, if it matters, against what.
ROWS: list[tuple[Aim, str, str, str, Ask]] = [
    (AHEAD, TUNED, FRESH, "", _ahead(TUNED)),
    (AHEAD, TUNED, FRESH, "Torch-Pruning of the teacher alone", _minus(TUNED, THEIRS)),
    (AHEAD, STARTED_FINALS, FRESH, TWICE, _ahead(STARTED_FINALS)),
    (AHEAD, QUARTER, CHOSEN, "", _ahead(QUARTER)),
    (AHEAD, STARTED, "cifar10_mobilenet_v2_cpu", HALF, _ahead(STARTED)),
    (AHEAD, STARTED, "cifar10_resnet20_few", TWICE, _ahead(STARTED)),
    (AHEAD, QUARTER, "cifar10_vit_cpu", "", _ahead(QUARTER)),
    (AHEAD, TAUGHT, "cifar10_resnet56", "", _ahead(TAUGHT)),
    (KEPT, TUNED, FRESH, "", _kept(TUNED)),
    (KEPT, STARTED_FINALS, FRESH, "", _kept(STARTED_FINALS)),
    (KEPT, TAUGHT, "cifar10_resnet56", "", _kept(TAUGHT)),
    (LEVEL, TRIED, CHOSEN, "STP's shape from scratch", _at_equal_macs(TRIED, "scratch")),
    (
        LEVEL, TRIED, CHOSEN, "its own shape from scratch",
        _at_equal_macs(TRIED, "scratch, shape that was tried"),
    ),
    (RATIO, OURS, CHOSEN, "", _grown(OURS, "ratio")),
    (HELD, OURS, CHOSEN, "", _grown(OURS, "dropped_norm")),
    (
        FOUND, STARTED_FINALS, FRESH, "filled uniform widths",
        _minus(STARTED_FINALS, f"{STARTED}, filled uniform widths"),
    ),
    (EXPANDED, STARTED, FRESH, "", _minus(STARTED, f"{STARTED}, no expansion")),
    (MAIN, TUNED, FRESH, "with a teacher", _minus(TUNED, "dense", key="main_top1")),
    (MAIN, OURS, CHOSEN, "without one", _minus(OURS, "dense", key="main_top1")),
    (COST, STARTED_FINALS, FRESH, "without the teacher's training", _cost(STARTED_FINALS, 1)),
    (COST, STARTED_FINALS, FRESH, "with it", _cost(STARTED_FINALS, 0)),
]  # fmt: skip


def section(comparisons: Path, proxies: Path) -> list[str]:
    """The part of docs/results.md that says what holds."""
    verdicts = []
    for aim, form, place, against, ask in ROWS:
        path = comparisons / f"{place}.jsonl"
        lines = read(path) if path.exists() else []
        where = ", ".join(filter(None, (PLACES[place], against)))
        figures = {budget: ask(lines, budget) for budget in aim.least}
        verdicts.append((aim, LETTERS.get(form, f"`{form}`"), where, figures))
    verdicts += _taus(proxies / f"{CHOSEN}.jsonl")
    out, told = [], ""
    for aim, form, where, figures in verdicts:
        measured = {budget: found for budget, found in figures.items() if found}
        if measured:
            text = "" if aim.text == told else aim.text  # once, above those who have the same
            out.append(row([text, form, where, *_cells(aim, measured)]))
            told = aim.text
    if not out:
        return []
    heading = ["what STP is to be worth", "form", "where, against what"]
    heading += [*map(str, BUDGETS), "holds"]
    return ["## In short", "", EXPLANATION, "", row(heading), row(["---"] * len(heading)), *out, ""]


EXPLANATION = (
    "All of it in trainings so short that no network levels off, most of them on two cores; the "
    "letters are those of [the method](method.md#what-each-part-gives), and the sections below "
    "have the conditions. Mean ± standard deviation over seeds, their number in brackets; what has "
    "to be *ahead* of a part taken out has to be so by more than that deviation. What is not "
    "there was not measured."
)


def _cells(aim: Aim, figures: dict[float, list[float]]) -> list[str]:
    signed = 0.0 in aim.least.values()
    met = [budget for budget, found in figures.items() if aim.met(found, budget)]
    holds = "yes" if len(met) == len(figures) else f"at {', '.join(map(str, met))}" if met else "no"
    return [*(spread(figures.get(budget, []), sign=signed) for budget in BUDGETS), holds]


def _taus(path: Path) -> list[Verdict]:
    """Of the score that decides in the end."""
    steps = f"{Exploration().final_steps} on {Exploration().tuning_images}"
    found: dict[tuple[str, int], dict[float, list[Line]]] = {}
    for line in read(path) if path.exists() else []:
        if steps in line["scores"]:
            group = found.setdefault((line["method"], line["seed"]), {})
            group.setdefault(line["budget"], []).append(line)
    return [
        (TAU, LETTERS[method], f"{PLACES[CHOSEN]}, seed {seed}",
         {budget: [tau(lines, steps)[0]] for budget, lines in shapes.items()})
        for (method, seed), shapes in found.items()
    ]  # fmt: skip
