"""The report of a run: one HTML page that needs nothing but itself."""

from .page import render, with_space
from .plots import accuracy_against_macs

__all__ = ["accuracy_against_macs", "render", "with_space"]
