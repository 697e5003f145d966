"""Structured pruning without fine-tuning: Enhanced Sparsification via Stimulative Training.

import stp_ray as stp

net = stp.Supernet.trace(model, example_input)
subnet = net.space.uniform(0.5)
small = net.extract(subnet, stp.calibrate(net, subnet, batches))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .elastic import Budget, Cost, SearchSpace, Subnet, Supernet
    from .export import load
    from .method import calibrate
    from .stages.pipeline import run

#: Where each public name lives. Loaded on first use, so that `stp_ray.elastic` and
#: `stp_ray.method` need torch alone.
_HOMES = {
    "Budget": "elastic",
    "Cost": "elastic",
    "SearchSpace": "elastic",
    "Subnet": "elastic",
    "Supernet": "elastic",
    "calibrate": "method",
    "load": "export",
    "run": "stages.pipeline",
}

__all__ = [
    "Budget",
    "Cost",
    "SearchSpace",
    "Subnet",
    "Supernet",
    "calibrate",
    "load",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
