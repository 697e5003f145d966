"""The one thing that every generated page needs."""

from collections.abc import Iterable


def row(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
