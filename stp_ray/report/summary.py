"""What a run came to, network by network."""

from collections.abc import Mapping
from typing import Any

from ..elastic.show import table


class Summary(dict[str, Any]):
    """A run's summary: the dictionary that summary.json holds (top-1 and retention in per cent,
    MACs of one image, latency in milliseconds), which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        headings = ("network", "top-1, %", "of dense, %", "MACs", "params", "latency, ms")
        rows = [
            (
                row["name"],
                _rounded(row["top1"]),
                _rounded(row["retention_dense"]),
                row["macs"],
                row["params"],
                _rounded(row["latency_ms"]),
            )
            for row in networks(self)
        ]
        return table(headings, rows, caption=self["run_id"])


def networks(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each network: dense, main, and each budget with its control.

    Args:
        summary: as in summary.json.

    Returns:
        Rows of `name` and the keys of an entry of `summary["budgets"]`, None where it was not
        measured.
    """
    latency = next((entry.get("dense_latency_ms") for entry in summary["budgets"].values()), None)
    full = {"macs": summary["macs"], "params": summary["params"], "latency_ms": latency}
    rows = []
    if summary.get("dense_top1") is not None:
        rows.append({"name": "dense, trained alone", "top1": summary["dense_top1"], **full})
    rows.append({"name": "main network", "top1": summary.get("main_top1"), **full})
    for budget, entry in summary["budgets"].items():
        rows.append({"name": f"pruned, {budget}", **entry})
        if entry.get("control_top1") is not None:
            name = f"same shape from scratch, {budget}"
            kept = {key: None for key in entry if key.startswith("retention")}
            rows.append({**entry, **kept, "name": name, "top1": entry["control_top1"]})
    return [{"retention_dense": None, "retention_main": None, **row} for row in rows]


def unequal_epochs(config: Mapping[str, Any]) -> list[str]:
    """What has to be said of a retention, in sentences, for those that it is against have not seen
    as many epochs.

    Args:
        config: the resolved configuration, as in config.json; nothing is said of one without
            epochs.
    """
    # as `RunConfig.epochs_before` counts; what an earlier version wrote may be none of today's
    trainings = (config.get("supernet"), config.get("finalize"))
    supernet, ladder = (
        ((each or {}).get("optimisation") or {}).get("epochs") for each in trainings
    )
    if supernet is None or ladder is None:
        return []
    baseline, begun = config.get("baseline"), config["supernet"].get("from_baseline", False)
    dense = baseline["epochs"] if baseline else 0
    seen = dense * begun + supernet + ladder
    told = [
        f"The main network was measured before the last {ladder} of the {seen} epochs that the "
        "weights of the pruned one have seen."
    ]
    if baseline is None or dense == seen:
        return told
    if not dense:
        return [
            "The dense network that retention is against has the weights that were given; the "
            f"pruned one started from them and was trained for {seen} epochs more, as long as its "
            "shape from scratch where there is one.",
            *told,
        ]
    started = ", from which the pruned one started" if begun else ""
    return [
        f"The dense network that retention is against was trained for {dense} epochs{started}; "
        f"the weights of the pruned one have seen {seen}.",
        *told,
    ]


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"
