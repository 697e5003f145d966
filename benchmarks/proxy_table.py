"""Whether the search's score ranks, from the lines that `proxy.py` has written."""

import math
import statistics
from collections import defaultdict
from pathlib import Path

from accuracy_tables import save
from differences import NOT_MEASURED
from filling import Line, read
from markdown_table import row
from matplotlib.figure import Figure
from scipy.stats import kendalltau

from stp_ray.method import Exploration

Group = tuple[str, int, float]
"""Method, seed, budget."""

#: How a shape was chosen, and its mark in the plot.
MARKS = {"random": "o", "uniform": "s", "explored": "*"}
#: What the plot shows: scores of slices as they are, and those that decide in the end.
SHOWN = {
    "0": "as it is",
    f"{Exploration().final_steps} on {Exploration().tuning_images}": "of finalists",
}


def section(kept: Path, docs: Path) -> list[str]:
    """The part of docs/results.md on the score; writes its plots beside it."""
    lines: list[str] = []
    for path in sorted(kept.glob("*.jsonl")):
        groups: dict[Group, list[Line]] = defaultdict(list)
        for line in read(path):
            groups[line["method"], line["seed"], line["budget"]].append(line)
        lines += _protocol(path.stem, dict(sorted(groups.items(), key=_order)))
        _plot(groups, docs / f"{path.stem}-proxy.svg")
        lines += [f"![Accuracy against the score]({path.stem}-proxy.svg)", ""]
    return ["## Does the score rank?", "", EXPLANATION, "", *lines] if lines else []


EXPLANATION = (
    "`python benchmarks/proxy.py PROTOCOL --data FOLDER`. The search ranks shapes by how badly "
    "their slices imitate the main network after stimulative training: as they are, and those "
    "that it promotes once more after some steps in which a copy of the slice learns from the main "
    "network, from half of the learning rate on 512 images, or, as the pipeline does, on 4,096 and "
    "from the rate that the second phase starts with. That was seen on seed 1, and the supernet of "
    "seed 0 is not there any more to score by. Here shapes within a budget, the one that the "
    "method's "
    "search found, the uniform one and random ones, get the whole distillation that the found one "
    "gets. Supernets were trained for this table, those of `cifar10_resnet20_cpu` before the two "
    "changes that the comparison tells of, that of `cifar10_resnet20_fresh` when nothing of the "
    "score was left to choose: a search may have found another shape than there. Kendall's tau is "
    "that of the score (lower is better) with top-1 after it: 1 where both rank alike, 0 where the "
    "score says nothing; a star: p < 0.05. In brackets that of the random ones alone, among which "
    "is none that a score has chosen. Some shapes were trained twice, by other orders of the "
    "images, augmentation and expanded networks: what the two differ by bounds what a score can "
    "say. One that knew the mean of many trainings would have a tau of "
    "2/pi asin(sqrt(1 - d^2/s^2)) with one of them, if both were normal: d is the deviation of a "
    "training, s that of the shapes."
)


def _order(group: tuple[Group, list[Line]]) -> Group:
    (method, seed, budget), _ = group
    return method, seed, -budget


def tau(lines: list[Line], steps: str) -> tuple[float, float]:
    """Kendall's tau of the score after so many steps with the accuracy, and the chance of one so
    far from zero by accident."""
    return _tau([-line["scores"][steps] for line in lines], lines)


def _tau(ranks: list[float], lines: list[Line]) -> tuple[float, float]:
    found = kendalltau(ranks, [line["top1"] for line in lines])
    return float(found.statistic), float(found.pvalue)


def apart(lines: list[Line]) -> float:
    """The standard deviation of one training, from shapes that were trained twice."""
    return math.sqrt(statistics.mean((line["again"] - line["top1"]) ** 2 for line in lines) / 2)


def most(lines: list[Line], noise: float) -> float:
    """The tau with one training of a score that knew what each shape comes to on average. Of
    normal variables tau is 2/pi asin(correlation)."""
    spread = statistics.variance(line["top1"] for line in lines)
    share = max(0.0, 1 - noise**2 / spread) if spread else 0.0
    return 2 / math.pi * math.asin(math.sqrt(share))


def _protocol(name: str, groups: dict[Group, list[Line]]) -> list[str]:
    everything = [line for lines in groups.values() for line in lines]
    first = everything[0]
    steps = list(dict.fromkeys(key for line in everything for key in line["scores"]))
    heading = [
        "method", "seed", "budget", "shapes", *map(_heading, steps),
        "deviation of a training (shapes trained twice)", "tau, a second training",
        "the most that a score can have", "found", "uniform", "random, median", "random, best",
    ]  # fmt: skip
    out = [
        f"{name}, {first['device']}, {first['threads']} thread(s), torch {first['torch']}, "
        f"revision {', '.join(sorted({line['revision'] for line in everything}))}.",
        "",
        row(heading),
        row(["---"] * len(heading)),
    ]
    for (method, seed, budget), lines in groups.items():
        by = defaultdict(list)
        for line in lines:
            by[line["how"]].append(line["top1"])
        drawn = by["random"]
        alone = [line for line in lines if line["how"] == "random"]
        cells = [method, seed, budget, len(lines)]
        for count in steps:
            if any(count not in line["scores"] for line in lines):
                cells.append(NOT_MEASURED)
                continue
            (statistic, chance), (unchosen, _) = tau(lines, count), tau(alone, count)
            cells.append(f"{statistic:.2f}{'*' * (chance < 0.05)} ({unchosen:.2f})")
        cells += _again(lines)
        cells += [f"{by[how][0]:.2f}" for how in ("explored", "uniform")]
        out.append(row([*cells, f"{statistics.median(drawn):.2f}", f"{max(drawn):.2f}"]))
    return [*out, ""]


def _again(lines: list[Line]) -> list[str]:
    """What two trainings of the same shapes say of each other, and of what a score can reach."""
    twice = [line for line in lines if "again" in line]
    if len(twice) < 2:
        return [NOT_MEASURED] * 3
    noise = apart(twice)
    between, chance = _tau([line["again"] for line in twice], twice)
    return [
        f"{noise:.2f} ({len(twice)})", f"{between:.2f}{'*' * (chance < 0.05)}",
        f"{most(lines, noise):.2f}",
    ]  # fmt: skip


def _heading(key: str) -> str:
    steps, _, images = key.partition(" on ")
    return f"tau, {steps} steps" + (f", {int(images):,} images" if images else "")


def _plot(groups: dict[Group, list[Line]], path: Path) -> None:
    budgets = sorted({budget for *_, budget in groups}, reverse=True)
    figure = Figure(figsize=(7.5, 3.2 * len(budgets)), layout="constrained")
    panels = figure.subplots(len(budgets), len(SHOWN), squeeze=False, sharey="row")
    for budget, row_of in zip(budgets, panels, strict=True):
        lines = [line for (*_, b), found in groups.items() if b == budget for line in found]
        for (steps, kind), axes in zip(SHOWN.items(), row_of, strict=True):
            for how, mark in MARKS.items():
                of = [line for line in lines if line["how"] == how and steps in line["scores"]]
                axes.plot(
                    [line["scores"][steps] for line in of], [line["top1"] for line in of],
                    mark, label=how, markersize=10 if mark == "*" else 5,
                )  # fmt: skip
            axes.set_title(f"{budget:g} of the MACs", fontsize="medium")
            axes.set_xlabel(f"KL from the main network, {kind}")
        row_of[0].set_ylabel("top-1 after distillation, %")
        row_of[0].legend(frameon=False, fontsize="small")
    save(figure, path)
