"""What the generated pages share."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def row(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def put_between(page: Path, marks: tuple[str, str], parts: Sequence[str]) -> None:
    """Write the parts in place of what a page has between two marks, which stay."""
    start, end = marks
    before, _, rest = page.read_text().partition(start)
    _, _, after = rest.partition(end)
    page.write_text("\n".join([f"{before}{start}", "", *parts, f"{end}{after}"]))
