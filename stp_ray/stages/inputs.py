"""What a run is made from besides its settings, and that it is the same whenever the run goes on:
a recipe names images, first weights and its user's code by where they lie, not by what they are."""

import hashlib
import json
from typing import Any

import fsspec
from torch import fx

from ..artifacts import Store
from ..config import RunConfig
from ..data import DataSummary
from ..elastic import Supernet
from ..errors import ConfigError

INPUTS = "inputs.json"

_WORDS = {"data": "images", "weights": "first weights", "network": "code of the network"}


def inputs(config: RunConfig, summary: DataSummary, net: Supernet) -> dict[str, Any]:
    """What `inputs.json` holds: a digest of the images' layout, one of the first weights, and one
    of a network that the user's own code builds.

    Args:
        config: the run's configuration; its weights have been loaded before.
        summary: what the data holds.
        net: the traced network.
    """
    weights = config.model.weights
    if weights is not None:
        with fsspec.open(weights, "rb") as file:
            weights = hashlib.sha256(file.read()).hexdigest()
    own = ":" in config.model.name
    return {
        "data": summary.fingerprint,
        "weights": weights,
        "network": _digest(net.model) if own else None,
    }


def _digest(model: fx.GraphModule) -> str:
    """Of operations, their arguments, layers, and the shapes of tensors; not of their values, which
    machines compute differently."""
    places = {node: f"%{place}" for place, node in enumerate(model.graph.nodes)}
    lines = []
    for node in model.graph.nodes:
        layer = repr(model.get_submodule(str(node.target))) if node.op == "call_module" else ""
        arguments = fx.node.map_arg((node.args, node.kwargs), places.__getitem__)
        lines.append([node.op, getattr(node.target, "__name__", node.target), layer, arguments])
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    content = json.dumps([lines, shapes], default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def require_same(run: Store, found: dict[str, Any]) -> None:
    """Check what a run goes on with against what it was begun with.

    Args:
        run: the run's folder. One that has no such file, or lacks a part of it, was begun by an
            earlier version.
        found: what there is now.

    Raises:
        ConfigError: it was begun with something else.
    """
    if not run.exists(INPUTS):
        return
    begun = run.read_json(INPUTS)
    for name, words in _WORDS.items():
        if begun.get(name, found[name]) != found[name]:
            raise ConfigError(
                f"{run.uri} was begun with other {words} than the recipe names now; expected the "
                "same, for its stages are made from them; put those back, or give the new run a "
                "name of its own (name=...)"
            )
