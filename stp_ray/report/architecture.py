"""The network before and after, layer by layer."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ..elastic.space import SearchSpace
from ..elastic.subnet import Subnet

_SPACE_KEY = b"space"


def with_space(candidates: pa.Table, space: SearchSpace, modules: Sequence[str] = ()) -> pa.Table:
    """The table with the space written into its schema's metadata (key "space", JSON).

    It travels with the Parquet file, so that the report can draw the network before and after
    without the model.

    Args:
        candidates: every subnet scored.
        space: what they were drawn from.
        modules: names of the network's modules in their order, which the drawing follows;
            without them it follows the axes.
    """
    homes = {layer: block.name for block in space.blocks for layer in block.layers}
    layers = {
        layer: {"axis": axis.name, "block": homes.get(layer) or _home(axis.name, space)}
        for axis in space.axes
        for layer in axis.layers or (axis.name,)
    }
    place = {name: number for number, name in enumerate(modules)}
    content = {
        "axes": {axis.name: axis.size for axis in space.axes},
        "units": {axis.name: axis.unit for axis in space.axes},
        "blocks": {block.name: list(block.axes) for block in space.blocks},
        "layers": dict(sorted(layers.items(), key=lambda item: place.get(item[0], len(place)))),
    }
    metadata = {**(candidates.schema.metadata or {}), _SPACE_KEY: json.dumps(content).encode()}
    return candidates.replace_schema_metadata(metadata)


def _home(axis: str, space: SearchSpace) -> str | None:
    return next((block.name for block in space.blocks if axis in block.axes), None)


def drawing(candidates: pa.Table, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """A row for each layer with its full width and, for each budget, what is left of it.

    Args:
        candidates: the table that `with_space` returned.
        chosen: budget -> row of the table.

    Returns:
        `budgets`; `rows` of `layer`, `size`, `unit`, `span` (the full width in per cent of the
        widest layer with that unit) and `cells` of `width`, `share` (per cent) and `dropped`;
        the number of `blocks`, and those `dropped` by each budget. None where the subnets or the
        space are not in the table.
    """
    subnets = {
        budget: Subnet.from_json(row["subnet"])
        for budget, row in chosen.items()
        if row.get("subnet")
    }
    metadata = (candidates.schema.metadata or {}).get(_SPACE_KEY)
    if not subnets or metadata is None:
        return None
    space = json.loads(metadata)
    sizes, units = space["axes"], space["units"]
    widest = {unit: max(sizes[a] for a in sizes if units[a] == unit) for unit in units.values()}
    rows = []
    for layer, place in space["layers"].items():
        axis, block = place["axis"], place["block"]
        size = sizes[axis]
        cells = []
        for subnet in subnets.values():
            dropped = block in subnet.dropped
            width = 0 if dropped else subnet.widths[axis]
            cells.append({"width": width, "share": 100 * width / size, "dropped": dropped})
        span = 100 * size / widest[units[axis]]
        rows.append(
            {"layer": layer, "size": size, "unit": units[axis], "span": span, "cells": cells}
        )
    return {
        "budgets": list(subnets),
        "rows": rows,
        "blocks": len(space["blocks"]),
        "dropped": {budget: sorted(subnet.dropped) for budget, subnet in subnets.items()},
    }
