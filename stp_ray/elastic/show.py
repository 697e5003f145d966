"""Tables for a notebook: plain HTML, which any front end shows in its own style."""

from collections.abc import Iterable, Sequence
from html import escape


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """An HTML table; integers get thousands separators, all text is escaped.

    Args:
        headings: one for each column.
        rows: cells; None leaves one empty.
        caption: what stands above.
    """
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{above}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def folded(summary: str, content: str) -> str:
    """HTML that opens on a click, for what is long."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _cell(value: object) -> str:
    if value is None:
        return "<td></td>"
    return f"<td>{escape(f'{value:,}' if isinstance(value, int) else str(value))}</td>"
