"""From a run's tables to the page: what is shown, in plain rows; the template only places it."""

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import pyarrow as pa
import yaml
from markupsafe import Markup

from ..elastic.subnet import Subnet
from ..errors import StorageError
from . import plots
from .architecture import drawing
from .sides import changed, classes
from .spending import spending
from .summary import networks, unequal_epochs

_MOST_POINTS = 400
_NOT_CURVES = {"epoch", "step", "lr", "time", "seconds", "images_per_s", "steps_per_epoch"}
#: What `method.sparsity` measures: plots of their own, not losses.
_SPARSITY = ("kept_norm", "dropped_norm", "ratio")
_NAMES = {
    "loss": "loss (all terms)",
    "ce": "labels",
    "kd": "main network → subnets",
    "ce_target": "labels → chosen",
}
_RUNTIMES = {
    "onnx": "ONNX Runtime",
    "pt2": "torch.export",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
}


def render(
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    candidates: pa.Table,
    curves: Mapping[str, pa.Table],
    environment: Mapping[str, Any] | None = None,
    stages: Mapping[str, Mapping[str, Any]] | None = None,
    pruned: Mapping[str, Mapping[str, Any]] | None = None,
    predictions: Mapping[str, pa.Table] | None = None,
    subnets: Mapping[str, str] | None = None,
) -> str:
    """The report page of a run: one HTML text, no script, no request to anywhere.

    Args:
        summary: the run's summary, as in summary.json.
        config: the resolved configuration.
        candidates: every subnet scored, one row for each score: columns `macs` and `score`,
            and where present `subnet_id`, `subnet` (JSON), `images` (the number it was
            scored on, 0 for all) and `steps` (of a distillation before it).
            `with_space` adds what the drawing of the network needs.
        curves: a folder -> a table of one row per step: `step` or `epoch`, and any metrics.
        environment: what environment.json holds.
        stages: what manifest.json says of each stage.
        pruned: budget -> what its pruned.json holds.
        predictions: budget -> what its predictions.parquet holds.
        subnets: budget -> what its subnet.json holds.

    Raises:
        StorageError: `candidates` lacks a column that is needed.
    """
    scored = _best_fidelity(candidates)
    chosen = _chosen(scored, summary)
    templates = resources.files(__package__)
    loader = jinja2.FunctionLoader(lambda name: templates.joinpath(name).read_text("utf-8"))
    jinja = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pruned, predictions = pruned or {}, predictions or {}
    usual = {"rungs": 1, "main": "train", "p_start": 0.5, "p_end": 0.0}
    expansion = usual | (config.get("finalize") or {}).get("expansion", {})
    return jinja.get_template("page.html.j2").render(
        summary=summary,
        cards=[_card(budget, entry, summary) for budget, entry in summary["budgets"].items()],
        rows=networks(summary),
        notes=unequal_epochs(config),
        threads=(environment or {}).get("latency_threads"),
        figures=_figures(summary, scored, chosen, curves, _ladder_names(expansion)),
        expansion=expansion,
        architecture=architecture(candidates, summary, subnets or {}),
        classes=classes(predictions),
        reference=_reference(pruned),
        sides={budget: changed(table) for budget, table in predictions.items()},
        runtimes=_runtimes(summary, pruned),
        spending=spending(stages or {}, (config.get("cluster") or {}).get("device_price")),
        device="GPU" if (config.get("cluster") or {}).get("use_gpu") else "CPU core",
        config=yaml.safe_dump(_plain(config), sort_keys=False),
        environment=yaml.safe_dump(_plain(environment or {}), sort_keys=False),
        model=(config.get("model") or {}).get("name", "model"),
        data=(config.get("data") or {}).get("name", "data"),
        duration=_duration(summary.get("seconds")),
    )


def architecture(
    candidates: pa.Table, summary: Mapping[str, Any], subnets: Mapping[str, str]
) -> dict[str, Any] | None:
    """The network before and after, as `drawing` returns it.

    Args:
        candidates: every subnet scored, as `render` takes them.
        summary: the run's summary.
        subnets: budget -> subnet (JSON) that was pruned to. One that was cut down to its budget is
            no candidate; without it the candidate is taken.

    Raises:
        StorageError: `candidates` lacks a column that is needed.
    """
    found = _chosen(_best_fidelity(candidates), summary)
    found |= {budget: {"subnet": subnet} for budget, subnet in subnets.items()}
    return drawing(candidates, {b: found[b] for b in summary["budgets"] if b in found})


def _chosen(
    scored: Sequence[dict[str, Any]], summary: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    return {
        budget: row
        for budget, entry in summary["budgets"].items()
        for row in scored
        if row["subnet_id"] == entry["subnet_id"]
    }


def _card(budget: str, entry: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """How much smaller, how much faster, and how much accuracy."""
    faster, dense = None, summary.get("dense_top1")
    if entry.get("latency_ms") and entry.get("dense_latency_ms"):
        faster = entry["dense_latency_ms"] / entry["latency_ms"]
    against, name = (dense, "dense") if dense is not None else (summary.get("main_top1"), "main")
    return {
        "budget": budget,
        "top1": entry["top1"],
        "smaller": summary["macs"] / entry["macs"],
        "lighter": summary["params"] / entry["params"],
        "faster": faster,
        "latency_ms": entry.get("latency_ms"),
        "dense_latency_ms": entry.get("dense_latency_ms"),
        "measured": entry.get("measured"),
        "change": None if against is None else entry["top1"] - against,
        "against": against,
        "against_name": name,
        "retention": entry.get(f"retention_{name}"),
        "uri": entry["uri"],
    }


def _reference(pruned: Mapping[str, Mapping[str, Any]]) -> str:
    """The network that predictions are compared with, in words."""
    name = next((each.get("compared_with") for each in pruned.values()), None)
    return "the dense network trained alone" if name == "baseline" else "the main network"


def _runtimes(
    summary: Mapping[str, Any], pruned: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One row for each program of each budget: its latency and its difference to the network."""
    return [
        {
            "name": f"{_RUNTIMES.get(kind, kind)}, {budget}",
            "latency_ms": figures["latency_ms"],
            "difference": figures["difference"],
        }
        for budget in summary["budgets"]
        for kind, figures in (pruned.get(budget, {}).get("programs") or {}).items()
    ]


def _best_fidelity(candidates: pa.Table) -> list[dict[str, Any]]:
    """One row for each subnet, its score of the highest fidelity; without scores that are not
    finite."""
    for column in ("macs", "score"):
        if column not in candidates.column_names:
            raise StorageError(
                f"the table of candidates has the columns {', '.join(candidates.column_names)}; "
                f"expected {column} as well; run the exploration again"
            )
    best: dict[Any, tuple[tuple[int, bool], dict[str, Any]]] = {}
    for number, row in enumerate(candidates.to_pylist()):
        if row["score"] is None or not math.isfinite(row["score"]):
            continue
        subnet = row.get("subnet")
        row.setdefault("subnet_id", Subnet.from_json(subnet).id if subnet else None)
        identity = row["subnet_id"] or number
        fidelity = _fidelity(row)
        if identity not in best or fidelity >= best[identity][0]:
            best[identity] = (fidelity, row)
    return [row for _, row in best.values()]


def _fidelity(row: Mapping[str, Any]) -> tuple[int, bool]:
    """Steps before the score, and whether it is one on all images: what says most is the largest.
    As with `Scored.fidelity`, only scores of the same are compared."""
    return row.get("steps", 0), not row.get("images", 0)


def _front(points: plots.Points) -> list[tuple[float, float]]:
    """The points that no other one beats in both, ascending in the first."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _figures(
    summary: Mapping[str, Any],
    scored: Sequence[Mapping[str, Any]],
    chosen: Mapping[str, Mapping[str, Any]],
    curves: Mapping[str, pa.Table],
    ladder: Mapping[str, str],
) -> dict[str, list[Markup]]:
    stars = {budget: (row["macs"], row["score"]) for budget, row in chosen.items()}
    cost = [plots.accuracy_svg(summary)]
    if scored:
        points: dict[tuple[int, bool], list[tuple[float, float]]] = {}
        for row in sorted(scored, key=_fidelity):
            points.setdefault(_fidelity(row), []).append((row["macs"], row["score"]))
        front = _front(points[max(points)])
        cost.append(plots.front_svg(points, front, stars))
    training, accuracy, sparsity = [], {}, {}
    for folder, table in curves.items():
        x_label, series = _series(table)
        top1 = {name: points for name, points in series.items() if "top1" in name}
        names = ladder if folder.startswith("budget-") else _NAMES
        for part in ("kd", "kd_target"):
            if not any(y for _, y in series.get(part, ())):  # nobody learnt by it
                series.pop(part, None)
        losses = {
            names.get(name, name): points
            for name, points in series.items()
            if name not in top1 and name not in _SPARSITY
        }
        if losses:
            training.append(plots.curves_svg(_stage_title(folder), losses, x_label, "loss"))
        for name, line in top1.items():
            label = folder if len(top1) == 1 else f"{folder}: {name}"
            accuracy[label] = _over_its_course(line)
        if all(name in series for name in _SPARSITY):
            sparsity[folder] = {name: _over_its_course(series[name]) for name in _SPARSITY}
    course = "per cent of the stage's training"
    if accuracy:
        training.append(plots.curves_svg("Accuracy", accuracy, course, "top-1, %"))
    effect = []
    if sparsity:
        ratios = {_stage_title(folder): lines["ratio"] for folder, lines in sparsity.items()}
        effect.append(plots.curves_svg("Kept over dropped", ratios, course, "ratio of the norms"))
        norms = {}
        for folder, lines in sparsity.items():
            norms[f"{_stage_title(folder)}, kept"] = lines["kept_norm"]
            norms[f"{_stage_title(folder)}, dropped"] = lines["dropped_norm"]
        effect.append(
            plots.curves_svg("Both norms", norms, course, "mean L2 norm of a channel", pairs=True)
        )
    # Markup: matplotlib has escaped every label, and nothing else is in them.
    return {
        "cost": [Markup(svg) for svg in cost],
        "training": [Markup(svg) for svg in training],
        "sparsity": [Markup(svg) for svg in effect],
    }


def _ladder_names(expansion: Mapping[str, Any]) -> dict[str, str]:
    """Names of a ladder's losses, by who teaches whom on it."""
    top = "main network" if expansion["main"] == "train" else "expanded"
    bottom = "expanded" if expansion["rungs"] else "main network"
    return {**_NAMES, "kd": f"{top} → expanded", "kd_target": f"{bottom} → chosen"}


def _stage_title(folder: str) -> str:
    """ "budget-0.15" -> "ladder to 0.15"; other folders are called as they are."""
    home, _, rest = folder.partition("/")
    if not home.startswith("budget-"):
        return folder
    kind = "ladder to" if not rest else f"{rest} of"
    return f"{kind} {home.removeprefix('budget-')}"


def _over_its_course(line: plots.Points) -> list[tuple[float, float]]:
    """Stages have different lengths: each is shown over its own course, in per cent."""
    end = line[-1][0] or 1.0
    return [(100 * x / end, y) for x, y in line]


def _series(table: pa.Table) -> tuple[str, dict[str, plots.Points]]:
    """The numeric columns over `step` or `epoch`, thinned, without holes."""
    x_name = next((name for name in ("step", "epoch") if name in table.column_names), None)
    xs = table[x_name].to_pylist() if x_name else range(table.num_rows)
    series: dict[str, plots.Points] = {}
    for name in table.column_names:
        kind = table.schema.field(name).type
        if name in _NOT_CURVES or not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            continue
        points = [
            (float(x), float(y))
            for x, y in zip(xs, table[name].to_pylist(), strict=True)
            if x is not None and y is not None and math.isfinite(y)
        ]
        if points:
            series[name] = _thinned(points)
    return x_name or "row", series


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MOST_POINTS` points, each the mean of its neighbours."""
    size = -(-len(points) // _MOST_POINTS)
    if size == 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _plain(content: Any) -> Any:
    """The content as JSON would hold it, which YAML can always write."""
    return json.loads(json.dumps(content, default=str))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
