"""Whether the search's score ranks, from the lines that `proxy.py` has written."""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from accuracy_tables import save
from markdown_table import row
from matplotlib.figure import Figure
from scipy.stats import kendalltau

Line = dict[str, Any]
Group = tuple[str, int, float]
"""Method, seed, budget."""

#: How a shape was chosen, and its mark in the plot.
MARKS = {"random": "o", "uniform": "s", "explored": "*"}
HEADING = (
    "method", "seed", "budget", "shapes", "Kendall's tau", "p",
    "found", "uniform", "random, median", "random, best",
)  # fmt: skip


def section(kept: Path, docs: Path) -> list[str]:
    """The part of docs/results.md on the score; writes its plots beside it."""
    lines: list[str] = []
    for path in sorted(kept.glob("*.jsonl")):
        groups: dict[Group, list[Line]] = defaultdict(list)
        for line in map(json.loads, path.read_text().splitlines()):
            groups[line["method"], line["seed"], line["budget"]].append(line)
        lines += _protocol(path.stem, dict(sorted(groups.items(), key=_order)))
        _plot(groups, docs / f"{path.stem}-proxy.svg")
        lines += [f"![Accuracy against the score]({path.stem}-proxy.svg)", ""]
    return ["## Does the score rank?", "", EXPLANATION, "", *lines] if lines else []


EXPLANATION = (
    "`python benchmarks/proxy.py PROTOCOL --data FOLDER`. The search never trains a candidate: it "
    "ranks shapes by how badly their slices imitate the main network after stimulative training. "
    "Here shapes within a budget, the one that the search found, the uniform one and random ones, "
    "get the whole distillation that the found one gets. Kendall's tau is that of the score (lower "
    "is better) with top-1 after it: 1 where both rank alike, 0 where the score says nothing."
)


def _order(group: tuple[Group, list[Line]]) -> Group:
    (method, seed, budget), _ = group
    return method, seed, -budget


def tau(lines: list[Line]) -> tuple[float, float]:
    """Kendall's tau of score and accuracy, and the chance of one so far from zero by accident."""
    found = kendalltau([-line["score"] for line in lines], [line["top1"] for line in lines])
    return float(found.statistic), float(found.pvalue)


def _protocol(name: str, groups: dict[Group, list[Line]]) -> list[str]:
    everything = [line for lines in groups.values() for line in lines]
    first = everything[0]
    out = [
        f"{name}, {first['device']}, {first['threads']} thread(s), torch {first['torch']}, "
        f"revision {', '.join(sorted({line['revision'] for line in everything}))}.",
        "",
        row(HEADING),
        row(["---"] * len(HEADING)),
    ]
    for (method, seed, budget), lines in groups.items():
        by = defaultdict(list)
        for line in lines:
            by[line["how"]].append(line["top1"])
        drawn = by["random"]
        statistic, chance = tau(lines)
        cells = [method, seed, budget, len(lines), f"{statistic:.2f}", f"{chance:.1g}"]
        cells += [f"{by[how][0]:.2f}" for how in ("explored", "uniform")]
        out.append(row([*cells, f"{statistics.median(drawn):.2f}", f"{max(drawn):.2f}"]))
    return [*out, ""]


def _plot(groups: dict[Group, list[Line]], path: Path) -> None:
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    budgets = sorted({budget for *_, budget in groups}, reverse=True)
    for axes, budget in zip(
        figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True
    ):
        lines = [line for (*_, b), found in groups.items() if b == budget for line in found]
        for how, mark in MARKS.items():
            of = [line for line in lines if line["how"] == how]
            axes.plot(
                [line["score"] for line in of], [line["top1"] for line in of],
                mark, label=how, markersize=10 if mark == "*" else 5,
            )  # fmt: skip
        axes.set_title(f"{budget:g} of the MACs", fontsize="medium")
        axes.set_xlabel("score before: KL from the main network")
        axes.set_ylabel("top-1 after distillation, %")
        axes.legend(frameon=False, fontsize="small")
    save(figure, path)
