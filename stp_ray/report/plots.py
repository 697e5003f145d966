"""Plots as SVG that take their foreground from the page, so they read in dark and light."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

#: Series colours, each with a contrast of at least 3 to a white and to a dark page.
PALETTE = ("#3a7fc4", "#c9701d", "#2f8f5b", "#b1559c", "#8a7a1e", "#c2504a")
FAINT = "#828b96"
ACCENT = PALETTE[1]

# Stands for the page's own text colour until the SVG is written.
_FOREGROUND = "#010203"
_LIGHT, _DARK = "#1f2328", "#e6edf3"

#: One candidate or series value: (MACs, score) or (step, value).
Points = Sequence[tuple[float, float]]


def short(count: float) -> str:
    """A count with a unit: 590 k, 41.3 M, 4.09 G."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def accuracy_against_macs(
    summary: Mapping[str, Any], format: Literal["svg", "png"] = "svg"
) -> bytes:
    """Top-1 against MACs of the dense, main and pruned networks, as a picture of its own.

    Args:
        summary: a run's summary.
        format: "svg" follows the reader's dark or light setting; "png" is on white.
    """
    with _style():
        figure = _accuracy_figure(summary)
        if format == "png":
            return _save(figure, "png")
    svg = _svg(figure, "Top-1 accuracy against MACs")
    style = (
        f"<style>svg{{color:{_LIGHT};font-family:system-ui,sans-serif}}"
        f"@media(prefers-color-scheme:dark){{svg{{color:{_DARK}}}}}</style>"
    )
    return svg.replace(">", f">{style}", 1).encode()


def accuracy_svg(summary: Mapping[str, Any]) -> str:
    """The same plot for a page."""
    with _style():
        figure = _accuracy_figure(summary)
    return _svg(figure, "Top-1 accuracy against MACs")


def front_svg(
    candidates: Mapping[tuple[int, bool], Points],
    front: Points,
    chosen: Mapping[str, tuple[float, float]],
) -> str:
    """Every candidate's distillation loss against its MACs.

    Args:
        candidates: (steps of distillation, whether on all images) -> (MACs, score) of every subnet
            whose last score is such a one, what says least first.
        front: those that no other one beats in both, ascending in MACs.
        chosen: budget -> (MACs, score) of the subnet that was pruned to.
    """
    with _style():
        figure, axes = _axes()
        shades = (FAINT, PALETTE[0], PALETTE[2])
        for shade, ((steps, whole), points) in zip(shades, candidates.items(), strict=False):
            words = "on all images" if whole and len(candidates) > 1 else "candidates"
            axes.scatter(
                *_columns(points),
                s=9,
                color=shade,
                alpha=0.6,
                linewidths=0,
                label=f"{len(points):,} {f'after {steps} steps' if steps else words}",
                rasterized=len(points) > 3000,
            )
        axes.plot(*_columns(front), color=PALETTE[0], marker=".", label="front")
        if chosen:
            axes.scatter(
                *_columns(list(chosen.values())),
                s=70,
                marker="*",
                color=ACCENT,
                zorder=3,
                label="chosen",
            )
        for budget, (macs, score) in chosen.items():
            axes.annotate(budget, (macs, score), (6, 6), textcoords="offset points")
        scores = [score for points in candidates.values() for _, score in points]
        _log_where_wide(axes, scores, ratio=5)
        _macs_axis(axes)
        axes.set_ylabel("KL from the main network")
        axes.legend()
    return _svg(figure, "Distillation loss of every candidate against its MACs")


def curves_svg(
    title: str,
    series: Mapping[str, Points],
    x_label: str,
    y_label: str = "",
    *,
    pairs: bool = False,
) -> str:
    """Lines over training; log scale where all values are positive and span two decades.

    Args:
        title, x_label, y_label: what stands at the plot.
        series: name -> (x, y) of its points.
        pairs: every second series belongs to the one before it: same colour, dashed.
    """
    with _style():
        figure, axes = _axes()
        for number, (name, points) in enumerate(series.items()):
            color = PALETTE[(number // 2 if pairs else number) % len(PALETTE)]
            line = "--" if pairs and number % 2 else "-"
            marker = "." if len(points) < 40 else ""
            axes.plot(*_columns(points), line, color=color, marker=marker, label=name)
        values = [value for points in series.values() for _, value in points]
        _log_where_wide(axes, values, ratio=100)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(series) > 1:  # below the plot, where no line runs through it
            figure.legend(loc="outside lower center", ncols=2)
    return _svg(figure, title)


def architecture_png(drawing: Mapping[str, Any]) -> bytes:
    """The network before and after: a bar for each layer, filled as far as each budget keeps it.

    Args:
        drawing: as `architecture.drawing` returns it.
    """
    rows, budgets = drawing["rows"], drawing["budgets"]
    with _style():
        height = 1.0 + 0.2 * len(rows)
        figure = Figure(figsize=(3.0 + 3.0 * len(budgets), height), layout="constrained")
        places = range(len(rows))
        spans = [row["span"] for row in rows]
        for number, budget in enumerate(budgets):
            axes = figure.add_subplot(1, len(budgets), number + 1)
            cells = [row["cells"][number] for row in rows]
            kept = [span * cell["share"] / 100 for span, cell in zip(spans, cells, strict=True)]
            axes.barh(places, spans, height=0.75, color="none", edgecolor=FAINT, linewidth=0.6)
            axes.barh(places, kept, height=0.75, color=PALETTE[0])
            for place, row, cell in zip(places, rows, cells, strict=True):
                words = "dropped" if cell["dropped"] else f"{cell['width']}/{row['size']}"
                axes.annotate(
                    words, (row["span"], place), (3, 0), textcoords="offset points", va="center",
                    fontsize=6,
                )  # fmt: skip
            axes.set_title(f"budget {budget}")
            axes.set_xlim(0, 125)
            axes.set_ylim(len(rows) - 0.4, -0.6)  # from the image at the top to the classes
            axes.set_xticks([])
            axes.set_yticks(places, [row["layer"] for row in rows] if number == 0 else [])
            axes.tick_params(axis="y", labelsize=6, length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)
        return _save(figure, "png")


def _accuracy_figure(summary: Mapping[str, Any]) -> Figure:
    figure, axes = _axes()
    entries = sorted((entry["macs"], entry["top1"]) for entry in summary["budgets"].values())
    main, dense = summary.get("main_top1"), summary.get("dense_top1")
    line = entries if main is None else [*entries, (summary["macs"], main)]
    axes.plot(*_columns(line), color=FAINT, linewidth=0.8)
    if main is not None:
        axes.scatter(summary["macs"], main, color=PALETTE[0], zorder=3, label="main network")
    if dense is not None:
        color = PALETTE[2]
        axes.scatter(summary["macs"], dense, marker="s", color=color, label="dense, trained alone")
        axes.axhline(dense, linewidth=0.8, linestyle=":", color=color)
    axes.scatter(*_columns(entries), s=70, marker="*", color=ACCENT, zorder=3, label="pruned")
    for macs, top1 in entries:
        axes.annotate(
            f"{top1:.1f} %", (macs, top1), (0, 9), textcoords="offset points", ha="center"
        )
    axes.set_xlim(0, summary["macs"] * 1.08)
    axes.margins(y=0.25)
    _macs_axis(axes)
    axes.set_ylabel("top-1, %")
    axes.legend(loc="lower right")
    return figure


def _axes() -> tuple[Figure, Axes]:
    # Small on purpose: on a phone the text stays readable when the plot fills the screen.
    figure = Figure(figsize=(5.0, 3.4), layout="constrained")
    return figure, figure.add_subplot()


def _log_where_wide(axes: Axes, values: Sequence[float], ratio: float) -> None:
    """A log scale with plain numbers, where all values are positive and differ that much."""
    if not values or min(values) <= 0 or max(values) / min(values) <= ratio:
        return
    axes.set_yscale("log")
    subs = (1.0, 2.0, 5.0) if max(values) / min(values) < 1000 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _macs_axis(axes: Axes) -> None:
    axes.set_xlabel("MACs of one image")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(
        {
            "axes.edgecolor": _FOREGROUND,
            "axes.labelcolor": _FOREGROUND,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlecolor": _FOREGROUND,
            "axes.titlesize": "medium",
            "font.family": ["sans-serif"],
            "font.size": 10.5,
            "legend.frameon": False,
            "legend.fontsize": "small",
            "legend.labelcolor": _FOREGROUND,
            "lines.linewidth": 1.5,
            "svg.fonttype": "none",
            "svg.hashsalt": "stp_ray",
            "text.color": _FOREGROUND,
            "text.parse_math": False,
            "xtick.color": _FOREGROUND,
            "ytick.color": _FOREGROUND,
        }
    ):
        yield


def _save(figure: Figure, format: str) -> bytes:
    buffer = io.BytesIO()
    if format == "svg":
        figure.savefig(buffer, format=format, transparent=True, metadata={"Date": None})
    else:
        figure.savefig(buffer, format=format, dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _svg(figure: Figure, label: str) -> str:
    """The figure as one <svg> element: no prolog, no metadata, no fixed size, no black."""
    with _style():
        text = _save(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Group names repeat from plot to plot, and nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    # The page's font instead of matplotlib's list.
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    text = text.replace(_FOREGROUND, "currentColor")
    opening = re.match(r"<svg[^>]*>", text)
    assert opening is not None
    view = re.search(r'viewBox="[^"]*"', opening[0])
    assert view is not None
    safe = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{view[0]} role="img" aria-label="{safe}">'
    )
    return (head + text[opening.end() :]).strip()
