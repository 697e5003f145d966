"""One way to refuse an option: what was found, what was expected, what to change."""


def require(holds: bool, field: str, value: object, expected: str, change: str) -> None:
    """Raise ValueError with a one-line message unless `holds`."""
    if not holds:
        raise ValueError(f"{field} is {value!r}; expected {expected}; {change}")
