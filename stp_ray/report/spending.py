"""Where time and money went, stage by stage."""

from collections.abc import Mapping
from typing import Any


def spending(stages: Mapping[str, Mapping[str, Any]], price: float | None) -> dict[str, Any] | None:
    """A row for each stage with the devices' time that it held.

    Args:
        stages: stage -> record of the manifest (`seconds`, `device_seconds`).
        price: of a device-hour; None where it is not known.

    Returns:
        `rows` of `stage`, `seconds`, `device_seconds`, `share` (per cent) and `money`, and the
        same figures as `total`; None without stages.
    """
    if not stages:
        return None
    total = sum(record["device_seconds"] for record in stages.values())

    def row(name: str, seconds: float | None, device_seconds: float) -> dict[str, Any]:
        return {
            "stage": name,
            "seconds": seconds,
            "device_seconds": device_seconds,
            "share": 100 * device_seconds / total if total else 0.0,
            "money": None if price is None else price * device_seconds / 3600,
        }

    rows = [row(name, r["seconds"], r["device_seconds"]) for name, r in stages.items()]
    # Budgets run side by side: their seconds cannot be added up.
    return {"rows": rows, "total": row("all", None, total)}
