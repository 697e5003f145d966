"""A model as a space of subnets: tracing, slicing, extraction and cost. Needs torch alone."""

from .cost import Budget, Cost
from .dims import Frozen
from .ranking import importance
from .space import ResidualBlock, SearchSpace, WidthAxis
from .subnet import Subnet
from .supernet import Stats, StatsRecorder, Supernet

__all__ = [
    "Budget",
    "Cost",
    "Frozen",
    "ResidualBlock",
    "SearchSpace",
    "Stats",
    "StatsRecorder",
    "Subnet",
    "Supernet",
    "WidthAxis",
    "importance",
]
