"""What the tables say alike."""

from .setting import Line


def where(line: Line) -> str:
    """The device of a line, its clock, and who else used the cores."""
    parts = [line["device"]]
    if line["device"] == "x86_64":
        parts.append(f"{line['threads']} thread{'s' * (line['threads'] > 1)}")
    if line.get("clock") == "processor":
        parts.append("processor time")
    if line.get("others", 0) >= 0.1:
        parts.append(f"others used {line['others']:.1f} cores")
    return ", ".join(parts)
