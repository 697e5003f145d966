"""What STP is to be worth and whether it is, from the lines that `accuracy.py` and `proxy.py` have
written: the front of docs/results.md, and all of it."""

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from contenders import (
    AGAIN,
    ALONE_FINALS,
    DENSE_TWICE,
    FILLED,
    GIVEN_SHAPE,
    OPTIONS,
    OURS,
    OWN_SHAPE,
    PENALTY,
    PLAIN,
    QUARTER,
    STARTED,
    STARTED_FINALS,
    TAUGHT,
    THEIRS,
    TRIED,
    TRIED_FINALS,
    TUNED,
)
from differences import costs, grown, over_best, paired, runs_of, searches_of, spread
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


def _searched(ask: Ask) -> Ask:
    """The same of means over all searches of (f), for seeds that have each of them."""
    searches = (STARTED_FINALS, *AGAIN)

    def asked(lines: list[Line], budget: float) -> list[float]:
        means = [
            {**runs[0], "top1": statistics.mean(run["top1"] for run in runs)}
            for runs in searches_of(lines, budget)
        ]
        return ask([line for line in lines if line["method"] not in searches] + means, budget)

    return asked


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


def _more_of_it(form: str, other: str) -> Ask:
    """How much more a form gains over another one at a budget than at 0.15."""

    def ask(lines: list[Line], budget: float) -> list[float]:
        found = []
        for seed in sorted({line["seed"] for line in lines}):
            of = [line for line in lines if line["seed"] == seed]
            there, here = (_minus(form, other)(of, at) for at in (budget, 0.15))
            found += [a - b for a, b in zip(there, here, strict=False)]  # one or none of each
        return found

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
SHRUNK = Aim("under a penalty dropped weights shrink", _everywhere(1.0), most=True, outside=True)
FOUND = Aim("a found shape is ahead of filled uniform widths", _everywhere(0.0), outside=True)
FOUND_THERE = Aim(
    "a found shape is ahead of the uniform one, not filled, of the same supernet",
    _everywhere(0.0),
    outside=True,
)
DRAWN = Aim("a found shape is ahead of a random one", _everywhere(0.0), outside=True)
EXPANDED = Aim("expansion is ahead of distilling directly", _everywhere(0.0), outside=True)
GROWING = Aim(
    "and the more so the smaller the budget: at 0.05 minus at 0.15", {0.05: 0.0}, outside=True
)
MAIN = Aim("the main network is not below the dense one", _everywhere(0.0))
COST = Aim("costs at most two dense trainings at 0.15", {0.15: 2.0}, most=True)
TAU = Aim("the score ranks as the accuracy does: Kendall's tau 0.6", _everywhere(0.6))
TAU_DRAWN = Aim("the same among random shapes alone, which no score has chosen", TAU.least)

WIDE = f"{STARTED}, wide expansion"
#: Forms of STP, and where they were run.
PAPER, AS_CHOSEN = (OURS, CHOSEN), (QUARTER, CHOSEN)
ELSEWHERE = ((QUARTER, MOBILE), (QUARTER, FEW), (QUARTER, VIT), (TAUGHT, DEEP))
#: Where they were trained without the expanded networks too: at two budgets, at the smaller alone.
LADDERS = (
    PAPER, AS_CHOSEN, (TUNED, CHOSEN), (STARTED, FRESH), (STARTED_FINALS, FRESH), (QUARTER, VIT),
    (TAUGHT, DEEP),
)  # fmt: skip
SMALL_LADDERS = ((PLAIN, CHOSEN), (QUARTER, FRESH), (QUARTER, MOBILE))
#: Widths that nobody has to find, from supernets of (c) and (d).
FILLED_QUARTER = f"{QUARTER}, filled uniform widths"
#: What a row says of figures each of which is a mean.
SEVERAL = "the mean of three searches a seed"
#: Torch-Pruning that spends least before it has pruned.
LEAN_PRUNING = "torch-pruning, even, labels alone"

#: What is aimed at, of which form, where, against what if that is not in the aim, and how to ask.
ROWS: list[tuple[Aim, str, str, str, Ask]] = [
    *(
        (AHEAD, *of, "", _ahead(of[0]))
        for of in (PAPER, AS_CHOSEN, (TUNED, FRESH), (TUNED, MOBILE), *ELSEWHERE)
    ),
    *(
        (LONG, form, place, "", _ahead(form))
        for form, place in (
            (STARTED, FRESH), (STARTED_FINALS, FRESH), (STARTED, MOBILE), (STARTED, FEW),
            (STARTED, VIT), (STARTED_FINALS, VIT),
        )
    ),
    (LONG, STARTED_FINALS, FRESH, SEVERAL, _searched(_ahead(STARTED_FINALS))),
    *(
        (OVER_THEIRS, form, place, "", _minus(form, THEIRS))
        for form, place in (
            (TUNED, FRESH), (STARTED, FRESH), (STARTED_FINALS, FRESH), (STARTED, MOBILE),
            (STARTED, FEW), (STARTED, VIT), (STARTED_FINALS, VIT),
        )
    ),
    (OVER_THEIRS, STARTED_FINALS, FRESH, SEVERAL, _searched(_minus(STARTED_FINALS, THEIRS))),
    *((KEPT, *of, "", _kept(of[0])) for of in (PAPER, AS_CHOSEN, (TUNED, FRESH), *ELSEWHERE)),
    *((KEPT, STARTED_FINALS, place, "", _kept(STARTED_FINALS)) for place in (FRESH, VIT)),
    (KEPT, STARTED_FINALS, FRESH, SEVERAL, _searched(_kept(STARTED_FINALS))),
    (KEPT, STARTED_FINALS, FRESH, DENSE_TWICE, _kept(STARTED_FINALS, DENSE_TWICE)),
    (
        KEPT, STARTED_FINALS, FRESH, f"`{DENSE_TWICE}`, {SEVERAL}",
        _searched(_kept(STARTED_FINALS, DENSE_TWICE)),
    ),
    *(
        (LEVEL, form, place, other, _at_equal_macs(form, other))
        for form, place, others in (
            (OURS, CHOSEN, (LEAN_PRUNING, "torch-pruning, even", "scratch at uniform widths",
                            "scratch")),
            (QUARTER, FEW, ("scratch, shape of a quarter",)),
            (ALONE_FINALS, CHOSEN, (LEAN_PRUNING, "torch-pruning, even",
                                    "scratch at uniform widths", "scratch")),
            (TRIED, CHOSEN, (LEAN_PRUNING, "torch-pruning, even", "scratch at uniform widths",
                             "scratch", "scratch, shape that was tried")),
            (TRIED_FINALS, CHOSEN, (LEAN_PRUNING, "torch-pruning, even", "scratch")),
        )
        for other in others
    ),
    *((RATIO, *of, "", _grown(of[0], "ratio")) for of in (PAPER, *ELSEWHERE)),
    *((HELD, *of, "", _grown(of[0], "dropped_norm")) for of in (PAPER, *ELSEWHERE)),
    (SHRUNK, PENALTY, CHOSEN, "", _grown(PENALTY, "dropped_norm")),
    *(
        (FOUND, form, FRESH, "", _minus(form, filled))
        for form, filled in (
            (QUARTER, FILLED_QUARTER), (TUNED, FILLED_QUARTER), (STARTED, FILLED),
            (STARTED_FINALS, FILLED),
        )
    ),
    (FOUND, STARTED_FINALS, FRESH, SEVERAL, _searched(_minus(STARTED_FINALS, FILLED))),
    *(
        (DRAWN, form, CHOSEN, "", _minus(form, f"{QUARTER}, random subnet"))
        for form in (QUARTER, TUNED)
    ),
    *(
        (EXPANDED, *of, "", _minus(of[0], f"{of[0]}, no expansion"))
        for of in (*LADDERS, *SMALL_LADDERS)
    ),
    (EXPANDED, WIDE, FRESH, "", _minus(WIDE, f"{STARTED}, no expansion")),
    *((GROWING, *of, "", _more_of_it(of[0], f"{of[0]}, no expansion")) for of in LADDERS),
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

#: Rows of the short table by their first four columns: the form that the recipes have, (d) where
#: epochs are what is counted, the method without a teacher, and what was run on a GPU.
SHORT = (
    (AHEAD, TUNED, FRESH, ""),
    (AHEAD, TAUGHT, DEEP, ""),
    (LONG, STARTED_FINALS, FRESH, SEVERAL),
    (LONG, STARTED_FINALS, VIT, ""),
    (OVER_THEIRS, STARTED_FINALS, FRESH, SEVERAL),
    (OVER_THEIRS, STARTED_FINALS, VIT, ""),
    (KEPT, STARTED_FINALS, FRESH, SEVERAL),
    (KEPT, STARTED_FINALS, FRESH, f"`{DENSE_TWICE}`, {SEVERAL}"),
    (KEPT, STARTED_FINALS, VIT, ""),
    (KEPT, TAUGHT, DEEP, ""),
    (LEVEL, OURS, CHOSEN, "scratch"),
    (RATIO, OURS, CHOSEN, ""),
    (HELD, OURS, CHOSEN, ""),
    (FOUND, STARTED_FINALS, FRESH, SEVERAL),
    (EXPANDED, STARTED_FINALS, FRESH, ""),
    (MAIN, STARTED_FINALS, FRESH, DENSE_TWICE),
    (COST, STARTED_FINALS, FRESH, "all counted"),
)

SEARCH = Exploration()
PROMOTED, FINAL = (
    f"{steps} on {SEARCH.tuning_images}" for steps in (SEARCH.tuning_steps, SEARCH.final_steps)
)
SEARCHES = (
    f"after {SEARCH.tuning_steps} steps on {SEARCH.tuning_images:,} images, which (f) searches by"
)
CHOOSES = "that of finalists, which (f) chooses by"
#: Scores of `proxy.py`: the form whose supernet they were measured on, where, steps, who uses them.
OF_RECIPES = (
    (TUNED, CHOSEN, PROMOTED, f"{SEARCHES}; chosen on this seed"),
    (STARTED_FINALS, FRESH, PROMOTED, SEARCHES),
    (TUNED, CHOSEN, FINAL, f"{CHOOSES}; chosen on this seed"),
    (STARTED_FINALS, FRESH, FINAL, CHOOSES),
)
SCORES = (
    (TAUGHT, CHOSEN, "0", "as the slice is, which (b) and (c) search by"),
    (TUNED, CHOSEN, "50", "after 50 steps on 512 images, which (d) and (e) search by"),
    *OF_RECIPES,
    *(
        (form, place, "100", "after 100 steps on 512 images, which no form uses")
        for form, place in ((TAUGHT, CHOSEN), (TUNED, CHOSEN), (STARTED_FINALS, FRESH))
    ),
)
#: Forms whose found and uniform shapes `proxy.py` has trained from one supernet.
SUPERNETS = ((TAUGHT, CHOSEN), (TUNED, CHOSEN), (STARTED_FINALS, FRESH))
#: Seeds that a figure rests on before it is called a claim.
ENOUGH = 3


def section(comparisons: Path, proxies: Path) -> list[str]:
    """The part of docs/results.md that says what holds: in short, and of every form."""
    short, whole = [], []
    for aim, form, place, against, ask in ROWS:
        path = comparisons / f"{place}.jsonl"
        lines = read(path) if path.exists() else []
        figures = {budget: found for budget in aim.least if (found := ask(lines, budget))}
        if figures:
            where = ", ".join(filter(None, (PLACES[place], _name(against))))
            whole.append((aim, _name(form), where, figures))
            if (aim, form, place, against) in SHORT:
                short.append(whole[-1])
    beside = _beside_uniform(proxies)
    whole += beside
    short += [verdict for verdict in beside if verdict[1] == LETTERS[STARTED_FINALS]]
    whole += _taus(proxies, SCORES, (TAU, TAU_DRAWN))
    short += _taus(proxies, OF_RECIPES, (TAU,))
    if not whole:
        return []
    return [
        *("## In short", "", EXPLANATION, "", *_table(short), ""),
        *("### Every form", "", *_table(whole), ""),
    ]


def _table(verdicts: list[Verdict]) -> list[str]:
    heading = ["what STP is to be worth", "form", "where, against what"]
    heading += [*map(str, BUDGETS), "holds"]
    out = [row(heading), row(["---"] * len(heading))]
    for aim, group in groupby(verdicts, lambda verdict: verdict[0]):
        for place, (_, form, where, figures) in enumerate(group):
            text = "" if place else aim.text  # once, above those who have the same
            out.append(row([text, form, where, *_cells(aim, figures)]))
    return out


EXPLANATION = """\
All of it is in trainings so short that no network levels off, most of them on two cores. *The
forms of STP*:

- `stp`: the method without a teacher, one subnet a step.
- (b): the dense network, trained before, says half of every label; four subnets a step.
- (c): (b), a quarter of whose epochs is stimulative, in place of half.
- (d): (c), and candidates of the search are tuned for some steps before they are scored.
- (e): (d), and training starts as that dense network, which is the teacher.
- (f): (e), and the best candidates are tuned for longer before one is chosen: what the recipes
  `cifar10_resnet20_cpu`, `cifar10_resnet56` and `imagenet_resnet50` do.

[The method](method.md#what-each-part-gives) has the settings of each; the pipeline tries no shapes
by themselves (*shapes tried*, *finals tried*), and other names are those of the sections below,
which have the conditions. Options were chosen by the first three seeds of ResNet-20, by the test
images that all seeds share; (e) and (f) were thought of after (d) had been run on the fresh ones.
(d) was run on those twice: before two changes (commit 808f6c0) it was ahead by 1.27 ± 0.95 and
1.93 ± 1.00, at 0.05 short of its aim. The aims of what starts as the teacher, of Torch-Pruning of
the teacher and of uniform widths came after first results. Mean ± standard deviation over seeds,
their number in brackets; the mean decides, but weights and parts have to be ahead by more than one
such deviation, which three seeds are by chance in one case of nine where there is nothing to find.
Each seed has one search where it does not say that it is the mean of three, whose table stands with
the fresh seeds; those made for the table of scores are beside the uniform shape of their supernets.
A verdict on fewer than three seeds is in
brackets: an observation, no claim. What is not there was not measured, such as (d) to (f) at equal
multiplications of training."""


def _name(method: str) -> str:
    form, _, option = method.rpartition(", ")
    if option in OPTIONS and method not in LETTERS and form in LETTERS:
        return f"{LETTERS[form]}, {option}"
    known = method in OWN_SHAPE or method in GIVEN_SHAPE
    return LETTERS.get(method, f"`{method}`" if known else method)


def _cells(aim: Aim, figures: dict[float, list[float]]) -> list[str]:
    signed = 0.0 in aim.least.values()
    firm = {budget: found for budget, found in figures.items() if len(found) >= ENOUGH}
    loose = {budget: found for budget, found in figures.items() if budget not in firm}
    if firm and loose:
        parts = [f"{', '.join(map(str, of))}: {_holds(aim, of)}" for of in (firm, loose)]
        holds = f"{parts[0]} ({parts[1]})"
    else:
        holds = _holds(aim, firm) if firm else f"({_holds(aim, loose)})"
    cells = [spread(figures.get(budget, []), sign=signed) for budget in BUDGETS]
    return [*cells, holds]


def _holds(aim: Aim, figures: dict[float, list[float]]) -> str:
    met = [budget for budget, found in figures.items() if aim.met(found, budget)]
    return "yes" if len(met) == len(figures) else f"at {', '.join(map(str, met))}" if met else "no"


def _beside_uniform(folder: Path) -> list[Verdict]:
    """What the found shape has more than the uniform one of the same supernet."""
    verdicts: list[Verdict] = []
    for method, place in SUPERNETS:
        path = folder / f"{place}.jsonl"
        top1 = {
            (line["budget"], line["seed"], line["how"]): line["top1"]
            for line in (read(path) if path.exists() else [])
            if line["method"] == method
        }
        figures: dict[float, list[float]] = defaultdict(list)
        for budget, seed, how in sorted(top1, reverse=True):
            if how == "explored" and (budget, seed, "uniform") in top1:
                figures[budget].append(top1[budget, seed, how] - top1[budget, seed, "uniform"])
        if figures:
            verdicts.append((FOUND_THERE, _name(method), PLACES[place], dict(figures)))
    return verdicts


def _taus(
    folder: Path, scores: tuple[tuple[str, str, str, str], ...], aims: tuple[Aim, ...]
) -> list[Verdict]:
    """Of each score that is judged, by the supernets that it was measured on."""
    verdicts: list[Verdict] = []
    for aim in aims:
        for method, place, steps, use in scores:
            path = folder / f"{place}.jsonl"
            lines = [
                line for line in (read(path) if path.exists() else [])
                if line["method"] == method and steps in line["scores"]
                and (aim is TAU or line["how"] == "random")
            ]  # fmt: skip
            if lines:
                seeds = sorted({line["seed"] for line in lines})
                named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
                where = f"{PLACES[place]}, {named}, {use}"
                verdicts.append((aim, _name(method), where, _ranked(lines, steps)))
    return verdicts


def _ranked(lines: list[Line], steps: str) -> dict[float, list[float]]:
    """Kendall's tau at each budget, one for each seed."""
    groups: dict[float, dict[int, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        groups[line["budget"]][line["seed"]].append(line)
    return {
        budget: [tau(seeds[seed], steps)[0] for seed in sorted(seeds)]
        for budget, seeds in sorted(groups.items(), reverse=True)
    }
