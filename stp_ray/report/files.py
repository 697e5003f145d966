"""The report of a run that is finished, from the artifacts it left."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from ..artifacts import Manifest, Store
from ..errors import StorageError
from . import plots
from .page import architecture, render

REPORT = "report.html"

_ORDER = ("baseline", "supernet")


def write_report(store: Store) -> str:
    """Write `report.html` into a run's folder, `store`, from its artifacts alone; returns its URI.

    Every folder of the run that holds a `metrics.parquet` becomes a training curve. What an
    older run did not leave is left out of the page.

    Raises:
        StorageError: an artifact is missing or damaged.
    """
    summary = store.read_json("summary.json")
    if not isinstance(summary, dict) or "budgets" not in summary:
        raise StorageError(
            f"{store.uri}/summary.json holds no summary; it is damaged: delete it, and the run's "
            "command writes it again"
        )
    homes = {budget: f"budget-{budget}" for budget in summary["budgets"]}
    places = [*store.names(), *(f"{home}/control" for home in homes.values())]
    folders = [name for name in places if store.exists(f"{name}/metrics.parquet")]
    folders.sort(key=lambda name: (name not in _ORDER, name))
    pruned: dict[str, Any] = {}
    predictions: dict[str, pa.Table] = {}
    for budget, home in homes.items():
        if store.exists(f"{home}/pruned.json"):
            pruned[budget] = store.read_json(f"{home}/pruned.json")
        if store.exists(f"{home}/predictions.parquet"):
            predictions[budget] = store.read_table(f"{home}/predictions.parquet")
    page = render(
        summary=summary,
        config=store.read_json("config.json"),
        candidates=store.read_table("explore/candidates.parquet"),
        curves={name: store.read_table(f"{name}/metrics.parquet") for name in folders},
        environment=(
            store.read_json("environment.json") if store.exists("environment.json") else None
        ),
        # its own stage is not done yet when the page is written first
        stages={name: s for name, s in Manifest(store).stages().items() if name != "report"},
        pruned=pruned,
        predictions=predictions,
        subnets=_subnets(store, summary),
    )
    store.write_bytes(REPORT, page.encode())
    return f"{store.uri}/{REPORT}"


def architecture_picture(store: Store) -> bytes | None:
    """The network before and after as a PNG; None where the run does not say.

    Args:
        store: the folder of a finished run.

    Raises:
        StorageError: an artifact is missing or damaged.
    """
    candidates = store.read_table("explore/candidates.parquet")
    summary = store.read_json("summary.json")
    drawn = architecture(candidates, summary, _subnets(store, summary))
    return None if drawn is None else plots.architecture_png(drawn)


def _subnets(store: Store, summary: Mapping[str, Any]) -> dict[str, str]:
    """Budget -> subnet (JSON) that its folder is about."""
    names = {budget: f"budget-{budget}/subnet.json" for budget in summary["budgets"]}
    return {b: store.read_bytes(name).decode() for b, name in names.items() if store.exists(name)}
