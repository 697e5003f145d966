"""The tables of docs/performance.md, from the lines that `speed.py` has written."""

import json
from importlib import import_module
from pathlib import Path

START, END = "<!-- measured -->", "<!-- end of measured -->"

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
    text = page.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    parts: list[str] = []
    for action in ACTIONS:
        path = kept / f"{action}.jsonl"
        if path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            parts += import_module(f"measure.{action}").table(lines)
    path = kept.parent / "scale" / "search.jsonl"
    if path.exists():
        parts += import_module("scale").table(list(map(json.loads, path.read_text().splitlines())))
    page.write_text("\n".join([f"{before}{START}", "", *parts, f"{END}{after}"]))
