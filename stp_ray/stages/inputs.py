"""What a run is made from besides its settings, and that it is the same whenever the run goes on:
a recipe names images, first weights and its user's code by where they lie, not by what they are."""

import hashlib
import json
import re
from typing import Any

from torch import fx, nn

from ..artifacts import Store
from ..config import RunConfig
from ..data import DataSummary
from ..elastic import Supernet
from ..errors import ConfigError, StorageError
from .network import read_weights

INPUTS = "inputs.json"

_WORDS = {"data": "images", "weights": "first weights", "network": "code of the network"}


def inputs(config: RunConfig, summary: DataSummary, net: Supernet) -> dict[str, Any]:
    """What `inputs.json` holds: a digest of the images' layout, one of the first weights, and one
    of a network that the user's own code builds.

    Args:
        config: the run's configuration; its weights have been loaded before.
        summary: what the data holds.
        net: the traced network.

    Raises:
        StorageError: the first weights cannot be read any more.
    """
    weights = config.model.weights
    if weights is not None:
        weights = hashlib.sha256(read_weights(weights)).hexdigest()
    own = ":" in config.model.name
    return {
        "data": summary.fingerprint,
        "weights": weights,
        "network": _digest(net.model) if own else None,
    }


def _digest(model: fx.GraphModule) -> str:
    """Of operations, their arguments, layers, and the names and shapes of tensors; not of values,
    which machines compute differently, nor of what a function does that is kept whole."""
    places = {node: f"%{place}" for place, node in enumerate(model.graph.nodes)}
    lines: list[Any] = []
    for node in model.graph.nodes:
        arguments = fx.node.map_arg((node.args, node.kwargs), places.__getitem__)
        lines.append([node.op, _name(node.target), repr(arguments)])
        if node.op == "call_module":
            layers = model.get_submodule(str(node.target)).modules()
            lines.append([[_name(type(layer)), _settings(layer)] for layer in layers])
    for name, parameter in model.named_parameters():
        lines.append([name, list(parameter.shape), parameter.requires_grad])
    lines += [[name, list(buffer.shape)] for name, buffer in model.named_buffers()]
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(lines))
    return hashlib.sha256(text.encode()).hexdigest()


def _name(target: Any) -> str:
    """What a node calls, or a class."""
    name = getattr(target, "__qualname__", None)
    return str(target) if name is None else f"{target.__module__}.{name}"


def _settings(layer: nn.Module) -> dict[str, str]:
    """The numbers, words and flags that a layer was made with."""
    plain = (bool, int, float, str, tuple)
    return {
        name: repr(value)
        for name, value in vars(layer).items()
        if isinstance(value, plain) and not name.startswith("_") and name != "training"
    }


def require_same(run: Store, found: dict[str, Any]) -> None:
    """Check what a run goes on with against what it was begun with.

    Args:
        run: the run's folder. One that has no such file, or lacks a part of it, was begun by an
            earlier version.
        found: what there is now.

    Raises:
        ConfigError: it was begun with something else.
        StorageError: what says so is damaged.
    """
    if not run.exists(INPUTS):
        return
    begun = run.read_json(INPUTS)
    if not isinstance(begun, dict):
        raise StorageError(
            f"{run.uri}/{INPUTS} holds {type(begun).__name__}; expected what a run was begun with; "
            "give the new run a name of its own (name=...)"
        )
    for name, words in _WORDS.items():
        if begun.get(name, found[name]) != found[name]:
            raise ConfigError(
                f"{run.uri} was begun with other {words} than the recipe names now; expected the "
                "same, for its stages are made from them; put those back, or give the new run a "
                "name of its own (name=...)"
            )
