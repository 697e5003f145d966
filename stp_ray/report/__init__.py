"""The report of a run: one HTML page that needs nothing but itself."""

from .architecture import with_space
from .files import architecture_picture, write_report
from .page import render
from .plots import accuracy_against_macs
from .summary import Summary, unequal_epochs

__all__ = [
    "Summary",
    "accuracy_against_macs",
    "architecture_picture",
    "render",
    "unequal_epochs",
    "with_space",
    "write_report",
]
