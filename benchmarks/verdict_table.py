"""What STP is to be worth and whether it is: the front of docs/results.md, from the lines that
`accuracy.py` and `proxy.py` have written."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contenders import (
    DENSE_TWICE,
    GIVEN_SHAPE,
    OPTIONS,
    OURS,
    OWN_SHAPE,
    PLAIN,
    QUARTER,
    STARTED,
    STARTED_FINALS,
    TAUGHT,
    THEIRS,
    TRIED,
    TUNED,
)
from differences import costs, grown, over_best, paired, runs_of, spread
from filling import Line, read
from markdown_table import row
from proxy_table import tau

from stp_ray.method import Exploration

BUDGETS = (0.5, 0.3, 0.15, 0.05)
#: The letters that docs/method.md has for forms of STP.
LETTERS = {TAUGHT: "(b)", QUARTER: "(c)", TUNED: "(d)", STARTED: "(e)", STARTED_FINALS: "(f)"}
#: Comparisons, and what the table calls them.
CHOSEN, FRESH, FEW = "cifar10_resnet20_cpu", "cifar10_resnet20_fresh", "cifar10_resnet20_few"
MOBILE, VIT, DEEP = "cifar10_mobilenet_v2_cpu", "cifar10_vit_cpu", "cifar10_resnet56"
PLACES = {
    CHOSEN: "ResNet-20",
    FRESH: "ResNet-20, fresh seeds",
    FEW: "ResNet-20, 2,000 images",
    MOBILE: "MobileNetV2",
    VIT: "ViT",
    DEEP: "ResNet-56, GPU",
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


def _kept(form: str, of: str = "dense") -> Ask:
    return lambda lines, b: paired(_epochs(lines), form, _epochs(lines), of, b, ratio=True)


def _at_equal_macs(form: str, other: str) -> Ask:
    def ask(lines: list[Line], budget: float) -> list[float]:
        macs = [line for line in lines if line["equal"] == "macs"]
        ours = runs_of(macs, form, budget) or _epochs(lines)  # whose expense is what the others get
        return paired(ours, form, macs, other, budget)

    return ask


def _cost(form: str, gift: int) -> Ask:
    """Without `gift` trainings of the dense network."""
    return lambda lines, b: [cost - gift for cost in costs(lines, form, b)]


def _grown(form: str, key: str) -> Ask:
    def ask(lines: list[Line], budget: float) -> list[float]:
        runs = runs_of(_epochs(lines), form, budget)
        return grown((line["sparsity"] for line in runs if "sparsity" in line), key)

    return ask


def _epochs(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line["equal"] == "epochs"]


AHEAD = Aim(
    "ahead of the best of all others in each seed, at equal epochs, by 1 point at 0.15 and 2 at "
    "0.05, and not behind at 0.5 and 0.3",
    {0.5: 0.0, 0.3: 0.0, 0.15: 1.0, 0.05: 2.0},
)
LONG = Aim("the same of what starts as the teacher, with others for twice the epochs", AHEAD.least)
OVER_THEIRS = Aim("the same over Torch-Pruning of the teacher", AHEAD.least)
KEPT = Aim("keeps 97 % of the dense network's top-1 at 0.15", {0.15: 97.0})
LEVEL = Aim("not behind another at equal multiplications of training", {0.15: 0.0, 0.05: 0.0})
RATIO = Aim("the norm of kept over dropped grows, last over first", _everywhere(1.0), outside=True)
HELD = Aim("dropped weights keep their norm, last over first", _everywhere(1.0))
FOUND = Aim("a found shape is ahead of filled uniform widths", _everywhere(0.0), outside=True)
EXPANDED = Aim("expansion is ahead of distilling directly", _everywhere(0.0), outside=True)
MAIN = Aim("the main network is not below the dense one", _everywhere(0.0))
COST = Aim("costs at most two dense trainings at 0.15", {0.15: 2.0}, most=True)
TAU = Aim("the score ranks as the accuracy does: Kendall's tau 0.6", _everywhere(0.6))

WIDE = f"{STARTED}, wide expansion"
#: Forms of STP, and where they were run.
PAPER, AS_CHOSEN = (OURS, CHOSEN), (QUARTER, CHOSEN)
ELSEWHERE = ((QUARTER, MOBILE), (QUARTER, FEW), (QUARTER, VIT), (TAUGHT, DEEP))

#: What is aimed at, of which form, where, against what if that is not in the aim, and how to ask.
ROWS: list[tuple[Aim, str, str, str, Ask]] = [
    *((AHEAD, *of, "", _ahead(of[0])) for of in (PAPER, AS_CHOSEN, (TUNED, FRESH), *ELSEWHERE)),
    *(
        (LONG, form, place, "", _ahead(form))
        for form, place in (
            (STARTED, FRESH), (STARTED_FINALS, FRESH), (STARTED, MOBILE), (STARTED, FEW),
            (STARTED, VIT), (STARTED_FINALS, VIT),
        )
    ),
    *(
        (OVER_THEIRS, form, place, "", _minus(form, THEIRS))
        for form, place in (
            (TUNED, FRESH), (STARTED, FRESH), (STARTED_FINALS, FRESH), (STARTED, MOBILE),
            (STARTED, FEW), (STARTED, VIT), (STARTED_FINALS, VIT),
        )
    ),
    *((KEPT, *of, "", _kept(of[0])) for of in (PAPER, AS_CHOSEN, (TUNED, FRESH), *ELSEWHERE)),
    *((KEPT, STARTED_FINALS, place, "", _kept(STARTED_FINALS)) for place in (FRESH, VIT)),
    (KEPT, STARTED_FINALS, FRESH, DENSE_TWICE, _kept(STARTED_FINALS, DENSE_TWICE)),
    *(
        (LEVEL, form, place, other, _at_equal_macs(form, other))
        for form, place, others in (
            (OURS, CHOSEN, ("torch-pruning, even", "scratch at uniform widths", "scratch")),
            (QUARTER, FEW, ("scratch, shape of a quarter",)),
            (TRIED, CHOSEN, ("torch-pruning, even", "scratch at uniform widths", "scratch",
                             "scratch, shape that was tried")),
        )
        for other in others
    ),
    *((RATIO, *of, "", _grown(of[0], "ratio")) for of in (PAPER, *ELSEWHERE)),
    *((HELD, *of, "", _grown(of[0], "dropped_norm")) for of in (PAPER, *ELSEWHERE)),
    *(
        (FOUND, form, FRESH, "", _minus(form, f"{base}, filled uniform widths"))
        for form, base in (
            (QUARTER, QUARTER), (TUNED, QUARTER), (STARTED, STARTED), (STARTED_FINALS, STARTED),
        )
    ),
    *(
        (EXPANDED, form, place, "", _minus(form, f"{form}, no expansion"))
        for form, place in (
            PAPER, (PLAIN, CHOSEN), AS_CHOSEN, (TUNED, CHOSEN), (QUARTER, FRESH), (STARTED, FRESH),
            (STARTED_FINALS, FRESH), (QUARTER, MOBILE), (QUARTER, VIT), (TAUGHT, DEEP),
        )
    ),
    (EXPANDED, WIDE, FRESH, "", _minus(WIDE, f"{STARTED}, no expansion")),
    *(
        (MAIN, form, place, against, _minus(form, against, key="main_top1"))
        for form, place, against in (
            (OURS, CHOSEN, "dense"),
            (TUNED, FRESH, "dense"),
            (TUNED, FRESH, "dense + distillation"),
            (STARTED_FINALS, FRESH, DENSE_TWICE),
            (TAUGHT, DEEP, "dense"),
        )
    ),
    (COST, OURS, CHOSEN, "", _cost(OURS, 0)),
    *(
        (COST, form, place, "the teacher's training not counted", _cost(form, 1))
        for form, place in (
            (TUNED, FRESH), (STARTED_FINALS, FRESH), (STARTED, MOBILE), (TAUGHT, DEEP),
        )
    ),
    (COST, STARTED_FINALS, FRESH, "all counted", _cost(STARTED_FINALS, 0)),
]  # fmt: skip

#: Scores of `proxy.py`, and what the table calls them.
SCORES = {
    "100": "100 steps on 512 images",
    f"{Exploration().final_steps} on {Exploration().tuning_images}": "that of finalists, which "
    "this seed chose",
}


def section(comparisons: Path, proxies: Path) -> list[str]:
    """The part of docs/results.md that says what holds."""
    verdicts = []
    for aim, form, place, against, ask in ROWS:
        path = comparisons / f"{place}.jsonl"
        lines = read(path) if path.exists() else []
        where = ", ".join(filter(None, (PLACES[place], _name(against))))
        figures = {budget: ask(lines, budget) for budget in aim.least}
        verdicts.append((aim, _name(form), where, figures))
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
    "The aims were set before anything was run. All of it is in trainings so short that no network "
    "levels off, most of them on two cores; options were chosen by the first three seeds of "
    "ResNet-20, and (e) and (f) were thought of after (d) had been run on the fresh ones. `stp` is "
    "the method without a teacher, the letters are those of "
    "[the method](method.md#what-each-part-gives), *target alone* is no part of the pipeline, and "
    "other names are those of the sections below, which have the conditions. Mean ± standard "
    "deviation over seeds, their number in brackets; the mean decides, but weights and parts have "
    "to be ahead by more than one such deviation. What is not there was not measured."
)


def _name(method: str) -> str:
    form, _, option = method.rpartition(", ")
    if option in OPTIONS and method not in LETTERS and form in LETTERS:
        return f"{LETTERS[form]}, {option}"
    known = method in OWN_SHAPE or method in GIVEN_SHAPE
    return LETTERS.get(method, f"`{method}`" if known else method)


def _cells(aim: Aim, figures: dict[float, list[float]]) -> list[str]:
    signed = 0.0 in aim.least.values()
    met = [budget for budget, found in figures.items() if aim.met(found, budget)]
    holds = "yes" if len(met) == len(figures) else f"at {', '.join(map(str, met))}" if met else "no"
    return [*(spread(figures.get(budget, []), sign=signed) for budget in BUDGETS), holds]


def _taus(path: Path) -> list[Verdict]:
    """Of each score that is judged, by the supernets that it was measured on."""
    found: dict[tuple[str, str, int], dict[float, list[Line]]] = {}
    for steps in SCORES:
        for line in read(path) if path.exists() else []:
            if steps in line["scores"]:
                group = found.setdefault((steps, line["method"], line["seed"]), {})
                group.setdefault(line["budget"], []).append(line)
    return [
        (TAU, _name(method), f"{PLACES[CHOSEN]}, seed {seed}, {SCORES[steps]}",
         {budget: [tau(lines, steps)[0]] for budget, lines in shapes.items()})
        for (steps, method, seed), shapes in found.items()
    ]  # fmt: skip
