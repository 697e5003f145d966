"""Which classes and which images pruning changed."""

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

_MOST_CLASSES = 24


def classes(predictions: Mapping[str, pa.Table]) -> dict[str, Any] | None:
    """Accuracy of each class before and after, those that changed most first where there are many.

    Args:
        predictions: budget -> rows of `label`, `before` and `after` (class indices), with the
            key "class_names" in the schema's metadata.

    Returns:
        `budgets`, `rows` of `name`, `images`, `before` (per cent) and `cells` of `after` and
        `change` (points), `largest` (the largest change, in points) and the number `left_out`;
        None without predictions.
    """
    if not predictions:
        return None
    first = next(iter(predictions.values()))
    names = json.loads(first.schema.metadata[b"class_names"])
    label = first["label"].to_numpy()
    images = np.bincount(label, minlength=len(names))
    before = _correct(first, "before", len(names))
    after = {budget: _correct(table, "after", len(names)) for budget, table in predictions.items()}
    rows = []
    for index, name in enumerate(names):
        if not images[index]:
            continue
        percent = 100 / images[index]
        cells = [
            {
                "after": percent * right[index],
                "change": percent * (int(right[index]) - int(before[index])),
            }
            for right in after.values()
        ]
        rows.append(
            {
                "name": name,
                "images": int(images[index]),
                "before": percent * before[index],
                "cells": cells,
            }
        )
    left_out = max(0, len(rows) - _MOST_CLASSES)
    if left_out:
        rows.sort(key=lambda row: -max(abs(cell["change"]) for cell in row["cells"]))
        rows = sorted(rows[:_MOST_CLASSES], key=lambda row: min(c["change"] for c in row["cells"]))
    largest = max((abs(cell["change"]) for row in rows for cell in row["cells"]), default=0.0)
    return {
        "budgets": list(predictions),
        "rows": rows,
        "largest": max(largest, 1.0),
        "left_out": left_out,
    }


def _correct(table: pa.Table, column: str, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    label, said = table["label"].to_numpy(), table[column].to_numpy()
    return np.bincount(label[label == said], minlength=count)


def changed(table: pa.Table) -> dict[str, Any]:
    """The images of one budget that only one of the two networks gets right.

    Returns:
        `lost` and `won`, each with its `count` and `images` of `src` (a data URI), `label`,
        `before` and `after` (class names); only the first dozen were kept.
    """
    names = json.loads(table.schema.metadata[b"class_names"])
    sides: dict[str, Any] = {side: {"count": 0, "images": []} for side in ("lost", "won")}
    for row in table.to_pylist():
        right = [row[column] == row["label"] for column in ("before", "after")]
        if right[0] == right[1]:
            continue
        side = sides["won" if right[1] else "lost"]
        side["count"] += 1
        if row["image"] is not None:
            picture = base64.b64encode(row["image"]).decode()
            said = {key: names[row[key]] for key in ("label", "before", "after")}
            side["images"].append({"src": f"data:image/png;base64,{picture}", **said})
    return sides
