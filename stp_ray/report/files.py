"""The report of a run that is finished, from the artifacts it left."""

from ..artifacts import Store
from .page import render

REPORT = "report.html"

_ORDER = ("baseline", "supernet")


def write_report(store: Store) -> str:
    """Write `report.html` into a run's folder from its artifacts alone; returns its URI.

    Every folder of the run that holds a `metrics.parquet` becomes a training curve.

    Raises:
        StorageError: an artifact is missing or damaged.
    """
    folders = [name for name in store.names() if store.exists(f"{name}/metrics.parquet")]
    folders.sort(key=lambda name: (name not in _ORDER, name))
    page = render(
        summary=store.read_json("summary.json"),
        config=store.read_json("config.json"),
        candidates=store.read_table("explore/candidates.parquet"),
        curves={name: store.read_table(f"{name}/metrics.parquet") for name in folders},
        environment=(
            store.read_json("environment.json") if store.exists("environment.json") else None
        ),
    )
    store.write_bytes(REPORT, page.encode())
    return f"{store.uri}/{REPORT}"
