"""What the recorded comparisons say: tables, paired differences and plots for docs/results.md."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from accuracy import PROTOCOLS
from bench import Protocol
from contenders import (
    AGAIN,
    ALONE_FINALS,
    DENSE_TWICE,
    FILLED,
    FINALS_TWICE,
    FORMS,
    GIVEN_SHAPE,
    LONGER,
    OPTIONS,
    OURS,
    OWN_SHAPE,
    PARTS,
    PENALTY,
    PLAIN,
    QUARTER,
    SCRATCH_TWICE,
    STARTED,
    STARTED_FINALS,
    TAUGHT,
    THEIRS,
    TRIED,
    TRIED_FINALS,
    TUNED,
    UNDECAYED,
    WHOLE,
    Stp,
)
from differences import (
    NOT_MEASURED,
    costs,
    dense_lines,
    grown,
    over_best,
    paired,
    runs_of,
    searches_of,
    spread,
)
from filling import Line, read
from markdown_table import row
from matplotlib.figure import Figure

ABOUT = {
    "cifar10_resnet56": (
        "CIFAR-10 (JPEG), 48,000 images of 32 px, ResNet-56, widths in multiples of 8, 24 epochs "
        "of 93 steps of 512 images, bf16, on one GPU that up to 18 trainings shared (`--jobs`, "
        "under CUDA's multi-process service). "
        "**So few steps leave every network far from where it levels off**, and not all "
        "methods were trained: what is not in the tables was not measured. "
        "Networks without exploration or expansion were trained in a first run, those without "
        "expansion from the same supernets and shapes as the rest. `a quarter, restart` came later "
        "and was not tried here."
    ),
    "cifar10_resnet20_cpu": (
        "**A reduced protocol for two CPU cores**: ResNet-20, 16,000 CIFAR-10 (JPEG) images at "
        "12 px, 12 epochs of 250 steps; 10,000 test images. So short a training is far from "
        "where any of these methods levels off: the figures compare methods with each other, and "
        "say nothing of what each can reach."
    ),
    "cifar10_resnet20_fresh": (
        "**The same protocol on seeds that nothing was chosen by.** The options of STP above "
        "were compared by their top-1 on the test images, with seeds 0 to 2; what won there is "
        "trained here once more, beside those of the others that came nearest to it. No epoch "
        "is seen twice, and searches start from filled uniform widths; all of it replaces a first "
        "run without those two changes (commit 808f6c0). What starts as the "
        "teacher came last, because of what these seeds had shown; its parts were left out one "
        "by one later. Options that nothing had tried came after that, on seed 3 alone but for "
        "one sampler: none of them became a default, and one seed of them is no claim. `finals` "
        "came after them; its steps were chosen by the table of scores below, on seed 1. `wide "
        "expansion` came last, after a trial of several such schedules on seed 1 (not recorded) in "
        "which it was best; and a second and a third search for `finals`, of supernets that were "
        "trained again, because one that was repeated had found another shape."
    ),
    "cifar10_resnet20_few": (
        "**Few images, for two CPU cores**: ResNet-20, 2,000 CIFAR-10 (JPEG) images at 12 px, 96 "
        "epochs of 31 steps; 10,000 test images. As many steps as with 16,000 images, but each of "
        "them is seen 96 times. Equal MACs are those of `a quarter, restart`, the training of its "
        "teacher among them; only scratch, the best at equal MACs with 16,000 images, was run for "
        "so many. What starts as the teacher or has twice the epochs was recorded after the two "
        "changes."
    ),
    "cifar10_vit_cpu": (
        "**A second family, reduced for two CPU cores**: a ViT of torchvision with six blocks of "
        "width 96, six heads, MLPs of width 192 and patches of 8 px; 16,000 CIFAR-10 (JPEG) images "
        "of 32 px, 12 epochs of 250 steps with AdamW; 10,000 test images. Torch-Pruning takes "
        "widths of heads, MLPs and embedding, in steps that leave a fifth of the larger budget "
        "unused, ours whole heads and blocks too. All networks, the "
        "dense one included, start from weights drawn by the defaults of their layers: from "
        "torchvision's own the dense network ends lower (50.61 ± 1.00, recorded in commit "
        "b2a2285). What starts as the teacher or has twice the epochs was recorded after the two "
        "changes, and for one seed alone where it has tuned scores or their shape. Norms were "
        "recorded while the output projection of a dropped attention counted as a layer that is "
        "cut, where it is gone; three of the six targets of the form with a restart drop one."
    ),
    "cifar10_mobilenet_v2_cpu": (
        "**A third family, reduced for two CPU cores**: MobileNetV2 of half its width, with "
        "strides for small images; 8,000 CIFAR-10 (JPEG) images at 12 px, 12 epochs of 125 steps; "
        "10,000 test images. So few steps leave every network far from where it levels off. The "
        "learning rate of all, 0.03, is the better of two for the dense network in a shorter "
        "trial. All was recorded after the two changes, which what has one phase and no search "
        "does not depend on."
    ),
}
#: Other forms whose retention and lead have a table, and what else they are compared with there.
CHANGED: dict[str, tuple[str, ...]] = {
    PLAIN: (OURS, f"{PLAIN}, no expansion"),
    "stp, taught": (),
    "stp, taught at first, four subnets a step": (),
    f"{TAUGHT}, tuned scores": (),
    TUNED: (
        QUARTER,
        f"{QUARTER}, uniform widths",
        f"{QUARTER}, filled uniform widths",
        f"{QUARTER}, random subnet",
        f"{TUNED}, no expansion",
        "scratch + distillation, shape of tuned scores",
        "scratch + distillation",
        "torch-pruning, even",
        THEIRS,
    ),
    STARTED: (
        TUNED,
        *(f"{STARTED}, {part}" for part in PARTS),
        f"{STARTED}, wide expansion",
        SCRATCH_TWICE,
        THEIRS,
        "torch-pruning, even",
        "scratch + distillation",
    ),
    STARTED_FINALS: (
        STARTED,
        *(f"{STARTED}, {part}" for part, without in PARTS.items() if "target" in without),
        f"{STARTED_FINALS}, no expansion",
        *AGAIN,
        FINALS_TWICE,
        THEIRS,
    ),
}
#: Ours at its cheapest, which equal MACs buy the most epochs of.
LEAN = ("stp, target alone", ALONE_FINALS, TRIED, TRIED_FINALS)
#: Trainings of a shape that STP found, and the same of shapes that nobody has to find.
UNFOUND = {
    "scratch": ("scratch at uniform widths", "scratch at a random shape"),
    "scratch + distillation": ("scratch + distillation at uniform widths",),
    "scratch + distillation, shape of a quarter": ("scratch + distillation at uniform widths",),
}


def section(kept: Path, docs: Path) -> list[str]:
    """The part of docs/results.md that compares methods; writes its plots beside it."""
    found = [(name, kept / f"{name}.jsonl") for name in ABOUT]
    found = [(name, path) for name, path in found if path.exists()]
    lines = ["## Against other methods at equal cost", "", EXPLANATION, ""] if found else []
    for name, path in found:
        results = read(path)
        lines += _protocol(name, results)
        _accuracy_plot(results, docs / f"{name}-methods.svg")
        lines += [f"![Top-1 against MACs, equal epochs]({name}-methods.svg)", ""]
        if len({line["method"] for line in results if line["method"].startswith(OURS)}) > 1:
            _ablation_plot(results, PROTOCOLS[name].budgets, docs / f"{name}-ablation.svg")
            lines += [
                f"Other forms of STP minus `{_lead(results)}`, equal epochs, within a seed:",
                "",
                f"![What each other form gives or costs]({name}-ablation.svg)",
                "",
            ]
        if any("sparsity" in line for line in results):
            smallest = min(line["budget"] for line in results if "sparsity" in line)
            _sparsity_plot(results, smallest, docs / f"{name}-sparsity.svg")
            penalty = any(line["method"] == PENALTY for line in results)
            lines += [
                "Mean L2 norm of a kept channel over that of a dropped one, and of both, by epoch "
                "(mean over seeds; the slice is the one that is pruned to in the end)."
                + (" The strength of the group lasso, 0.01, was not tuned." if penalty else ""),
                "",
                f"![Relative sparsity]({name}-sparsity.svg)",
                "",
                *_norms_table(results, PROTOCOLS[name]),
            ]
    return lines


EXPLANATION = """\
`python benchmarks/accuracy.py PROTOCOL --data FOLDER`. Mean ± standard deviation over seeds, their
number in brackets: where numbers differ, read the differences within a seed, not those of the
means. A revision with a + had changes that were not committed yet. Images, those of the test among
them, are the same for all seeds, which differ in weights and order. Which options of STP are good
was judged by these test images and seeds, but for the section of fresh seeds. All but that section,
what starts as the teacher or has twice the epochs, `torch-pruning, even, labels alone`, the forms
with the target alone and *finals*, and MobileNetV2 was recorded before two changes: second phases
saw the order and crops of the first epochs again, and searches started from uniform widths that
were not filled.
Differences between the two kinds have those changes in them.

- *Equal epochs*: every method passes over the images equally often; one that trains, prunes and
  tunes splits them. Teachers are a gift: distillation from the finished dense network does not
  count its training, which the table of training costs does, as 1.00. So is that network itself,
  where it is what training starts from (*of the teacher*): its epochs come on top of the others'.
- *Equal MACs*: every multiplication of training counts, forward and backward (a backward pass as
  two forward ones), teachers and exploration too; the others train until they have spent what
  STP spent.
- *STP*: half of the epochs is stimulative, with one subnet a step from the `narrowing` sampler.
- *Taught*: the dense network says half of every label, the gift that distillation from scratch
  gets; *taught at first*: in the stimulative phase alone. With *four subnets a step* each of
  them costs a pass, but no image more.
- *A quarter, restart*: a quarter of the epochs is stimulative, after which the learning rate
  warms up to its full height again instead of falling once over both phases. What follows its
  name are options of it changed or parts of it taken out.
- *Tuned scores*: the search scores what it promotes again after 50 steps of distillation, on 512
  images and from half of the learning rate. *Finals*: after 25, and the three best of each budget
  once more in the end after 200, on 4,096 images and from the rate that the second phase starts
  with. What these steps train are copies, which are thrown away. For both budgets together they
  read as many images as nine epochs have, and no labels: equal epochs do not count them, training
  costs do.
- *Second search*, *third search*: other candidates are drawn, of a supernet of the same seed.
- *Wide expansion*: the probability that a layer of an expanded network is wider falls from 1 to
  0, and not from 0.5.
- *Target without labels*: what is pruned to learns from the network above it alone, as the paper
  has it; that one was trained for itself, from supernets and with shapes that are not those of
  `stp`.
- *A sixth stimulative*: two of twelve epochs. *Main let go*: the second phase goes without the main
  network, and the expanded ones learn the labels in its place.
- *Target alone*: one epoch of the supernet, the search, then the found slice alone on the
  labels, whose loss counts twice (for the slice, and for the expanded network that it stands for);
  *shapes tried*: four of 32 candidates, and four more of their offspring, are trained by
  themselves for two epochs each before one is chosen, which equal MACs count and equal epochs do
  not; *finals*: with the search of (f), for both budgets, all of which each of them pays; *finals
  tried*: that search for one budget, whose best four are then trained by themselves for four epochs
  each.
- *Scratch*: the shape that STP found (*shape of four*: that of `stp, taught, four subnets a
  step`; *of a quarter*, *of tuned scores*, *of finals*, *that was tried*: of those forms), for
  which it does not pay; *at uniform widths* and *at a random shape* nobody has to find anything.
- *Uniform widths*: one ratio for all layers, rounded, which leaves some of a budget unused (the
  table of MACs that are left says how much); *filled*: the narrowest layers are a step wider,
  one after the other, until none fits.
- *Torch-pruning*: half of the epochs dense, then tuned with a teacher; *even*: all layers lose the
  same share; *sparse learning*: the last half of its dense training is under group sparsity;
  *labels alone*: one dense epoch and no teacher, so that equal MACs buy the most epochs; *of the
  teacher*: the finished dense network is pruned, and tuning has all epochs, so that among the best
  of all others it counts only against what starts as the teacher too, as does what has twice the
  epochs. At equal MACs its teacher is its own past before it was pruned.
- *Dense + distillation*: the dense network once more, taught by a finished one. STP's main network
  is taught so too, wherever STP is.
- *Twice the epochs*: what starts as the teacher has weights that have seen the teacher's epochs
  and as many of their own; here a dense network, and its shape from scratch with the same finished
  teacher, get as many in one schedule.
- *Group lasso*: half of the epochs dense, under a group lasso on the axes of our space; then pruned
  by the norms of its units, and tuned with a teacher.
- *Slimmable*: universally slimmable training, four widths a step, without a search or a second
  phase.
- 0.5 and 0.3: the supernet that was trained towards the other two budgets, pruned to these after
  a search of their own."""


def _protocol(name: str, lines: list[Line]) -> list[str]:
    first, reference = lines[0], PROTOCOLS[name].reference
    seeds = sorted({line["seed"] for line in lines})
    out = [
        f"### {name}",
        "",
        ABOUT[name],
        "",
        f"{first['device']}, {first['threads']} thread(s), torch {first['torch']}, revision "
        f"{', '.join(sorted({line['revision'] for line in lines}))}, seeds {seeds}.",
        "",
    ]
    budgets = _budgets(lines)
    for account, title in (("epochs", "Equal epochs"), ("macs", "Equal MACs of training")):
        rows = [line for line in lines if line["equal"] == account]
        if not rows:
            continue
        if account == "macs":  # what they are equal to
            rows = [line for line in lines if line["method"] == reference] + rows
        methods = list(dict.fromkeys(line["method"] for line in rows))
        out += [f"{title}, top-1:", "", row(["method", *map(str, budgets)]), _rule(budgets)]
        for method in methods:
            cells = [
                spread(line["top1"] for line in runs_of(rows, method, budget)) for budget in budgets
            ]
            out.append(row([method, *cells]))
        out.append("")
    out += [
        *_claims(lines, budgets, reference),
        *_searches(lines, budgets),
        "MACs that are left, % of the dense network's:",
        "",
        *_shares(lines, budgets),
        "Training cost over that of the dense network's epochs:",
        "",
    ]
    out += [row(["method", *map(str, budgets)]), _rule(budgets)]
    for method in dict.fromkeys(line["method"] for line in lines if line["equal"] == "epochs"):
        out.append(row([method, *(spread(costs(lines, method, budget)) for budget in budgets)]))
    return [*out, ""]


def _searches(lines: list[Line], budgets: list[float]) -> list[str]:
    """Top-1 of each of the searches that were repeated, and what their mean is worth."""
    against = ("dense", DENSE_TWICE)
    heading = ["budget", "seed", "first", *(name.rpartition(", ")[-1] for name in AGAIN), "apart"]
    heading += ["mean", "minus filled uniform widths", *(f"% of {name}" for name in against)]
    out: list[str] = []
    for budget in budgets:
        runs = searches_of(lines, budget)
        known = [{**of[0], "top1": statistics.mean(run["top1"] for run in of)} for of in runs]
        means = [line["top1"] for line in known]
        tops = [[run["top1"] for run in of] for of in runs]
        columns = [*map(list, zip(*tops, strict=True)), [max(t) - min(t) for t in tops], means]
        columns.append(paired(known, STARTED_FINALS, lines, FILLED, budget))
        columns += [paired(known, STARTED_FINALS, lines, m, budget, ratio=True) for m in against]
        if any(len(column) != len(runs) for column in columns):
            continue
        for line, *cells in zip(known, *columns, strict=True):
            out.append(row([str(budget), str(line["seed"]), *(f"{cell:.2f}" for cell in cells)]))
        if runs:
            out.append(row([str(budget), "all", *map(spread, columns)]))
    if not out:
        return []
    title = "Three searches a seed of what is called (f) above, top-1:"
    return [title, "", row(heading), _rule(heading[1:]), *out, ""]


def _shares(lines: list[Line], budgets: list[float]) -> list[str]:
    """How much of a budget each method fills, however it was counted what its training costs."""
    out = [row(["method", *map(str, budgets)]), _rule(budgets)]
    pruned = [line for line in lines if line["method"] not in WHOLE]
    for method in dict.fromkeys(line["method"] for line in pruned):
        cells = []
        for budget in budgets:
            by_seed = {line["seed"]: line for line in runs_of(pruned, method, budget)}
            shares = (100 * line["macs"] / line["full_macs"] for line in by_seed.values())
            cells.append(spread(shares))
        out.append(row([method, *cells]))
    return [*out, ""]


def _claims(lines: list[Line], budgets: list[float], reference: str) -> list[str]:
    """Differences within a seed, so that what a seed is lucky in cancels out."""
    epochs = [line for line in lines if line["equal"] == "epochs"]
    macs = [line for line in lines if line["equal"] == "macs"]
    out: list[str] = []
    for ours in (*FORMS, *CHANGED):
        if any(line["method"] == ours for line in epochs):
            questions = _summary(ours, epochs)
            if ours in FORMS:
                questions += _less(ours, epochs, epochs)
            else:
                questions += [_less_one(ours, epochs, epochs, other) for other in CHANGED[ours]]
            out += _differences(f"`{ours}`, equal epochs", questions, budgets)
    measured = {line["method"] for line in epochs}
    for found, others in UNFOUND.items():
        questions = [
            _less_one(found, epochs, epochs, other)
            for other in others
            if {found, other} <= measured
        ]
        if questions:
            out += _differences(f"What STP's shapes are worth: `{found}`", questions, budgets)
    if macs:
        questions = _less(reference, epochs, macs)
        out += _differences(f"`{reference}`, equal MACs", questions, budgets)
    for ours in LEAN:
        if any(line["method"] == ours for line in macs):
            out += _differences(f"`{ours}`, equal MACs", _less(ours, macs, macs), budgets)
    return out


#: What a row of a table says, and its figures at a budget, one for each seed.
Question = tuple[str, Callable[[float], list[float]]]


def _summary(ours: str, lines: list[Line]) -> list[Question]:
    longer: list[Question] = [
        (
            f"retention, % of {DENSE_TWICE}",
            lambda b: paired(lines, ours, lines, DENSE_TWICE, b, ratio=True),
        ),
        (
            f"main network at the end, minus {DENSE_TWICE}",
            lambda b: paired(lines, ours, lines, DENSE_TWICE, b, key="main_top1"),
        ),
    ]
    return [
        (
            "retention, % of the dense network's top-1",
            lambda b: paired(lines, ours, lines, "dense", b, ratio=True),
        ),
        (
            "main network at the end, minus the dense network",
            lambda b: paired(lines, ours, lines, "dense", b, key="main_top1"),
        ),
        (
            "main network at the end, minus dense + distillation",
            lambda b: paired(lines, ours, lines, "dense + distillation", b, key="main_top1"),
        ),
        *(longer if ours in LONGER else []),
        ("minus the best of all others in each seed", lambda b: over_best(lines, ours, b)),
    ]


def _less(ours: str, these: list[Line], those: list[Line]) -> list[Question]:
    return [
        _less_one(ours, these, those, other)
        for other in dict.fromkeys(line["method"] for line in those)
        if _is_compared(ours, other)
    ]


def _less_one(ours: str, these: list[Line], those: list[Line], other: str) -> Question:
    return f"minus {other}", lambda budget: paired(these, ours, those, other, budget)


def _is_compared(ours: str, other: str) -> bool:
    """Whether a difference says something: not of a shape that another form found, nor of another
    form with a part taken out or an option changed."""
    if other in GIVEN_SHAPE:
        return GIVEN_SHAPE[other][1] in (OURS, ours)
    form, _, part = other.rpartition(", ")
    return form == ours if part in (*PARTS, *OPTIONS) else other != ours


def _differences(title: str, questions: list[Question], budgets: list[float]) -> list[str]:
    rows = []
    for text, ask in questions:
        figures = [spread(ask(budget), sign=True) for budget in budgets]
        if any(figure != NOT_MEASURED for figure in figures):
            rows.append(row([text, *figures]))
    if not rows:  # measured, but at no budget at which the other was
        return []
    heading = row(["", *map(str, budgets)])
    return [f"{title}, differences within a seed:", "", heading, _rule(budgets), *rows, ""]


def _rule(budgets: list[float]) -> str:
    return row(["---"] * (len(budgets) + 1))


def _lead(lines: list[Line]) -> str:
    """The form of ours that others are shown beside: the one that was measured most often, of
    equals the first of these."""
    times = Counter(line["method"] for line in lines)
    return max((QUARTER, TUNED, TAUGHT, OURS), key=times.__getitem__)


def _accuracy_plot(lines: list[Line], path: Path) -> None:
    """Top-1 against MACs: ours, and the methods of others with its shapes or with their own."""
    rows = [line for line in lines if line["equal"] == "epochs" and line["budget"] != 1.0]
    lead = _lead(rows)
    measured = {line["method"] for line in rows}
    others = {m for m in measured if not m.startswith(OURS) and _is_compared(lead, m)}
    ours = [method for method in (OURS, STARTED) if method in measured - {lead}]
    methods = [lead, *ours, *sorted(others)]
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    tones = matplotlib.colormaps["tab20"].colors
    colours = [*tones[::2], *tones[1::2]]  # the full ones first, then their pale twins
    for place, method in enumerate(methods):
        at = [lines for lines in (runs_of(rows, method, b) for b in _budgets(rows)) if lines]
        tops = [[line["top1"] for line in lines] for lines in at]
        axes.errorbar(
            [statistics.mean(line["macs"] / line["full_macs"] for line in lines) for lines in at],
            [statistics.mean(top) for top in tops],
            yerr=[statistics.stdev(top) if len(top) > 1 else 0.0 for top in tops],
            marker="o" if method.startswith(OURS) else "s", markersize=4, capsize=2,
            linewidth=2 if method == lead else 1, label=method, color=colours[place % 20],
        )  # fmt: skip
    dense = [line["top1"] for line in dense_lines(lines)]
    if dense:
        axes.axhline(statistics.mean(dense), color="gray", linestyle=":", label="dense")
    axes.set_xscale("log")
    ticks = sorted({line["budget"] for line in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("share of the dense network's MACs")
    axes.set_ylabel("top-1, %")
    figure.legend(loc="outside lower center", frameon=False, fontsize="small", ncols=2)
    save(figure, path)


def _ablation_plot(lines: list[Line], budgets: Sequence[float], path: Path) -> None:
    """What each other form of ours is ahead of the best one, within a seed."""
    rows = [line for line in lines if line["equal"] == "epochs" and line["budget"] != 1.0]
    lead = _lead(rows)
    methods = [
        method for method in dict.fromkeys(line["method"] for line in rows)
        if method.startswith(OURS) and method != lead
    ]  # fmt: skip
    figure = Figure(figsize=(7.5, 1.2 + 0.25 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(budgets), sharex=True, sharey=True, squeeze=False)[0]
    for axes, budget in zip(panels, budgets, strict=True):
        found = [paired(rows, method, rows, lead, budget) for method in methods]
        axes.barh(
            range(len(methods)),
            [statistics.mean(values) if values else math.nan for values in found],
            xerr=[statistics.stdev(values) if len(values) > 1 else 0.0 for values in found],
            capsize=2, height=0.7,
        )  # fmt: skip
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(f"{budget:g} of the MACs", fontsize="medium")
        axes.set_xlabel("points of top-1")
    names = [method.replace(f"{lead}, ", "the same, ") for method in methods]
    panels[0].set_yticks(range(len(methods)), names, fontsize="small")
    panels[0].invert_yaxis()
    save(figure, path)


def _budgets(lines: list[Line]) -> list[float]:
    return sorted({line["budget"] for line in lines} - {1.0}, reverse=True)


def _norms(lines: list[Line], budget: float) -> dict[str, list[list[dict[str, float]]]]:
    """Method -> its runs, and of each the norms inside and outside of the slice by epoch; that of
    the same slice in the dense network's training, where it was recorded, is one of the methods."""
    rows = [line for line in lines if line["equal"] == "epochs" and "sparsity" in line]
    methods = {line["method"] for line in rows}
    lead = OURS if OURS in methods else _lead(rows)
    found = {
        method: [line["sparsity"] for line in runs_of(rows, method, budget)]
        for method in dict.fromkeys((lead, _lead(rows), UNDECAYED, PENALTY))
        if method in methods
    }
    dense = [
        line["dense_sparsity"] for line in runs_of(rows, lead, budget) if "dense_sparsity" in line
    ]
    return {**found, "dense, the same slice": dense} if dense else found


def _norms_table(lines: list[Line], protocol: Protocol) -> list[str]:
    """How much the norms grow or shrink over the whole training, and how far apart they are after
    stimulative training already."""
    heading = ["method", "budget", "kept, last over first", "dropped"]
    heading += ["ratio after stimulative training", "ratio at the end"]
    out = [row(heading), _rule(heading[1:])]
    found = {budget: _norms(lines, budget) for budget in protocol.budgets}
    for method in dict.fromkeys(method for norms in found.values() for method in norms):
        for budget, norms in found.items():
            if runs := norms.get(method):
                factors = [spread(grown(runs, key)) for key in ("kept_norm", "dropped_norm")]
                form = OWN_SHAPE.get(method)
                first = form.first(protocol.epochs) if isinstance(form, Stp) else None
                halfway = spread(run[first]["ratio"] for run in runs) if first else NOT_MEASURED
                ratios = [run[-1]["ratio"] for run in runs]
                ratio = spread(ratios) if max(ratios) < 100 else "over 100"
                out.append(row([method, str(budget), *factors, halfway, ratio]))
    return [*out, ""]


def _sparsity_plot(lines: list[Line], budget: float, path: Path) -> None:
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (method, runs) in enumerate(_norms(lines, budget).items()):
        steps = range(min(map(len, runs)))

        def mean(key: str, runs: list[Any] = runs, steps: range = steps) -> list[float]:
            return [statistics.mean(run[step][key] for run in runs) for step in steps]

        colour = f"C{place}"
        left.plot(steps, mean("ratio"), marker=".", color=colour, label=method)
        right.plot(steps, mean("kept_norm"), marker=".", color=colour)
        right.plot(steps, mean("dropped_norm"), marker=".", linestyle="--", color=colour)
    left.set_yscale("log")
    left.set_title(f"kept / dropped, budget {budget:g}", fontsize="medium")
    right.set_title("mean L2 norm (dropped: dashed)", fontsize="medium")
    for axes in (left, right):
        axes.set_xlabel("epoch")
    figure.legend(loc="outside lower center", frameon=False, fontsize="small")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a plot as SVG."""
    with matplotlib.rc_context({"svg.hashsalt": "stp_ray"}):  # the same file from the same figures
        figure.savefig(path, metadata={"Date": None})
