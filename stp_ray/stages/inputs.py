"""What a run is made from besides its settings, and that it is the same whenever the run goes on: a
recipe names images and first weights by where they lie, not by what they are."""

import hashlib
from typing import Any

import fsspec

from ..artifacts import Store
from ..config import RunConfig
from ..data import DataSummary
from ..errors import ConfigError

INPUTS = "inputs.json"

_WORDS = {"data": "images", "weights": "first weights"}


def inputs(config: RunConfig, summary: DataSummary) -> dict[str, Any]:
    """What `inputs.json` holds: a digest of the images' layout, and one of the first weights.

    Args:
        config: the run's configuration; its weights have been loaded before.
        summary: what the data holds.
    """
    weights = config.model.weights
    if weights is not None:
        with fsspec.open(weights, "rb") as file:
            weights = hashlib.sha256(file.read()).hexdigest()
    return {"data": summary.fingerprint, "weights": weights}


def require_same(run: Store, found: dict[str, Any]) -> None:
    """Check what a run goes on with against what it was begun with.

    Args:
        run: the run's folder. One that has no such file was begun by an earlier version.
        found: what there is now.

    Raises:
        ConfigError: it was begun with something else.
    """
    if not run.exists(INPUTS):
        return
    begun = run.read_json(INPUTS)
    for name, words in _WORDS.items():
        if begun.get(name) != found[name]:
            raise ConfigError(
                f"{run.uri} was begun with other {words} than the recipe names now; expected the "
                "same, for its stages are made from them; put those back, or give the new run a "
                "name of its own (name=...)"
            )
