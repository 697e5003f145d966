"""Figures of recorded comparisons, and differences within a seed, in which what a seed is lucky
in cancels out."""

import statistics
from collections import defaultdict
from collections.abc import Iterable

from contenders import AGAIN, LONGER, OURS, STARTED_FINALS
from filling import Line

NOT_MEASURED = "–"


def dense_lines(lines: Iterable[Line]) -> list[Line]:
    """Dense networks after the epochs that everyone has, one of each seed."""
    return [line for line in lines if line["method"] == "dense" and line["equal"] == "epochs"]


def runs_of(lines: Iterable[Line], method: str, budget: float) -> list[Line]:
    """The lines of a method at a budget; networks that are not pruned are there for each."""
    return [line for line in lines if line["method"] == method and line["budget"] in (budget, 1.0)]


def searches_of(lines: Iterable[Line], budget: float) -> list[list[Line]]:
    """What the searches of (f) that were repeated led to, the first one included: a list for each
    seed that has all of them."""
    methods = (STARTED_FINALS, *AGAIN)
    found: dict[int, dict[str, Line]] = defaultdict(dict)
    for line in lines:
        if line["method"] in methods and line["budget"] == budget and line["equal"] == "epochs":
            found[line["seed"]][line["method"]] = line
    return [
        [of[method] for method in methods]
        for _, of in sorted(found.items())
        if len(of) == len(methods)
    ]


def paired(
    these: list[Line],
    method: str,
    those: list[Line],
    other: str,
    budget: float,
    *,
    key: str = "top1",
    ratio: bool = False,
) -> list[float]:
    """What a method has (its `key`) minus the top-1 of another one, or in per cent of it, for each
    seed that both were run on. What expansion is worth counts where both trained the same shape."""
    one_shape = f"{method}, no expansion" == other
    against = {line["seed"]: line for line in runs_of(those, other, budget)}
    pairs = [
        (line, against[line["seed"]])
        for line in runs_of(these, method, budget)
        if line["seed"] in against
    ]
    return [
        100 * a[key] / b["top1"] if ratio else a[key] - b["top1"]
        for a, b in pairs
        if not one_shape or a.get("subnet") == b.get("subnet")
    ]


def over_best(lines: list[Line], method: str, budget: float) -> list[float]:
    """What the method is ahead of the best of the pruned networks that are not ours; those that
    see more epochs count where ours sees them too."""
    longer = method in LONGER
    found = []
    for line in runs_of(lines, method, budget):
        others = [
            other["top1"] for other in lines
            if other["seed"] == line["seed"] and other["budget"] == budget
            and not other["method"].startswith(OURS) and (longer or other["method"] not in LONGER)
        ]  # fmt: skip
        if others:
            found.append(line["top1"] - max(others))
    return found


def costs(lines: list[Line], method: str, budget: float) -> list[float]:
    """What a method's training costs at equal epochs, over the dense network's of the same seed."""
    base = {line["seed"]: line["training_macs"] for line in dense_lines(lines)}
    return [
        line["training_macs"] / base[line["seed"]]
        for line in runs_of(lines, method, budget)
        if line["equal"] == "epochs" and line["seed"] in base
    ]


def grown(runs: Iterable[list[dict[str, float]]], key: str) -> list[float]:
    """What a norm, or the ratio of two, is at the end of a training over what it was at first."""
    return [run[-1][key] / run[0][key] for run in runs]


def spread(values: Iterable[float], sign: bool = False) -> str:
    """Mean ± standard deviation and, in brackets, the number; `sign` says + too, of differences."""
    found = list(values)
    if not found:
        return NOT_MEASURED
    mean = statistics.mean(found)
    text = f"{mean:+.2f}" if sign and mean < 50 else f"{mean:.2f}"
    return (
        f"{text} ± {statistics.stdev(found):.2f} ({len(found)})"
        if len(found) > 1
        else f"{text} (1)"
    )
