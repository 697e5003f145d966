"""The tables of docs/performance.md, from the lines that `speed.py` has written."""

from importlib import import_module
from pathlib import Path

from filling import read
from markdown_table import put_between

MARKS = ("<!-- measured -->", "<!-- end of measured -->")

#: What is measured, in the order of the page: modules of `measure`.
ACTIONS = (
    "step",
    "autonas",
    "memory",
    "parallel",
    "exploring",
    "tuning",
    "inference",
    "latency",
    "streaming",
    "growth",
    "paper",
)


def performance(kept: Path, page: Path) -> None:
    """Write what was measured between the marks of the page."""
    parts: list[str] = []
    for action in ACTIONS:
        path = kept / f"{action}.jsonl"
        if path.exists():
            parts += import_module(f"measure.{action}").table(read(path))
    path = kept.parent / "scale" / "search.jsonl"
    if path.exists():
        parts += import_module("scale").table(read(path))
    put_between(page, MARKS, parts)
