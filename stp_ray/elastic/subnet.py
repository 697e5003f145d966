"""A subnet: one choice of width for every axis, and the residual blocks left out."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from operator import index
from types import MappingProxyType

from .show import folded, table


@dataclass(frozen=True, eq=False, repr=False)
class Subnet:
    """An immutable, hashable description of a subnet; names and integers, no tensors.

    Args:
        widths: axis name -> width, in the axis's own unit (channels, heads or groups).
        dropped: names of the residual blocks that are left out.

    Raises:
        ValueError: a width is not an integer, or `dropped` is one name alone.
    """

    widths: Mapping[str, int]
    dropped: frozenset[str] = frozenset()

    def __init__(self, widths: Mapping[str, int], dropped: Iterable[str] = ()) -> None:
        if isinstance(dropped, str):
            raise ValueError(f"dropped is {dropped!r}; expected a list or a set of names of blocks")
        try:
            ordered = {str(name): index(widths[name]) for name in sorted(widths)}
        except TypeError as error:
            raise ValueError(
                f"widths are {repr(widths)[:80]}; expected a mapping of axis names to integers"
            ) from error
        object.__setattr__(self, "widths", MappingProxyType(ordered))
        object.__setattr__(self, "dropped", frozenset(dropped))

    @cached_property
    def id(self) -> str:
        """Twelve hexadecimal digits that are the same for equal subnets on any machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """Canonical JSON: equal subnets give equal text."""
        content = {"dropped": sorted(self.dropped), "widths": dict(self.widths)}
        return json.dumps(content, separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Subnet":
        """Read a text that `to_json` wrote. Raises ValueError for anything else."""
        try:
            content = json.loads(text)
            widths, dropped = content["widths"], content["dropped"]
            if (
                set(content) != {"widths", "dropped"}
                or not isinstance(dropped, list)
                or not all(isinstance(name, str) for name in dropped)
            ):
                raise ValueError("unexpected content")
            if not all(type(width) is int for width in widths.values()):
                raise ValueError("a width is not an integer")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"not a subnet: {repr(text)[:80]} ({error}); expected "
                '{"dropped": [names], "widths": {name: integer}}'
            ) from error
        return cls(widths, dropped)

    def within(self, other: "Subnet") -> bool:
        """Whether `other` keeps all that this subnet keeps; one of another space does not."""
        return other.dropped <= self.dropped and all(
            width <= other.widths.get(name, 0) for name, width in self.widths.items()
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Subnet) and (self.widths, self.dropped) == (
            other.widths,
            other.dropped,
        )

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        dropped = f", without {', '.join(sorted(self.dropped))}" if self.dropped else ""
        return f"Subnet({self.id}: {len(self.widths)} widths{dropped})"

    def _repr_html_(self) -> str:
        widths = table(("axis", "width"), self.widths.items())
        return f"<p>{escape(repr(self))}</p>{folded('widths', widths)}"

    def __reduce__(self) -> tuple:
        return Subnet, (dict(self.widths), tuple(sorted(self.dropped)))
