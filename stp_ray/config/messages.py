"""What is wrong with a configuration, in one line."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

from ..elastic.cost import Budget


def one_line(error: ValidationError, tree: type[BaseModel]) -> str:
    """The first mistakes in a configuration of this type."""
    found = error.errors(include_url=False)
    messages = list(dict.fromkeys(_message(details, tree) for details in found))
    rest = f" (and {len(messages) - 3} more)" if len(messages) > 3 else ""
    return " | ".join(messages[:3]) + rest


def _message(details: Any, tree: type[BaseModel]) -> str:
    kind, path = details["type"], ".".join(str(part) for part in details["loc"])
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {path}{_nearest_key(path, tree)}"
    if kind == "value_error":
        # Our own checks name the field first, so that the path can continue with it.
        text = str(details["ctx"]["error"])
        field, _, _ = text.partition(" ")
        joined = "." if path and field in _children(_type_at(path, tree)) else ": "
        return f"{path}{joined}{text}" if path else text
    if kind == "missing":
        parent, _, last = path.rpartition(".")
        if last.isdigit():  # a list that is too short
            count = len(typing.get_args(_bare(_type_at(parent, tree))))
            return f"{parent} is {shown(details['input'])}; expected {count} values"
        return f"{parent} is {shown(details['input'])}; expected it to have {last} as well"
    expected = details["msg"]
    for old, new in (
        ("Input should be", "expected"),
        ("String should match pattern", "expected text that matches"),
        ("an object", "a mapping of keys to values"),
        ("a valid array", "a list"),
        ("a valid integer", "an integer"),
        ("a valid number", "a number"),
        ("a valid boolean", "true or false"),
        ("a valid string", "text (quote it if it looks like a number)"),
    ):
        expected = expected.replace(old, new)
    return f"{path} is {shown(details['input'])}; {expected}"


def shown(value: Any) -> str:
    """A value and its kind, short, on one line."""
    if value is None:
        return "null"
    kinds: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "true or false"),
        (int, "an integer"),
        (float, "a number"),
        (str, "text"),
        (Mapping, "a mapping"),
        ((list, tuple), "a list"),
    ]
    kind = next((name for types_, name in kinds if isinstance(value, types_)), type(value).__name__)
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A question, where one of the known words is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _nearest_key(path: str, tree: type[BaseModel]) -> str:
    """The known key nearest to an unknown one: a sibling first, then one anywhere."""
    parent, _, name = path.rpartition(".")
    siblings = list(_children(_type_at(parent, tree)))
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)
    if near:
        return f"; did you mean {parent + '.' if parent else ''}{near[0]}?"
    everywhere = list(_paths(tree))
    same = [known for known in everywhere if known.rpartition(".")[2] == name]
    if same:
        return f"; did you mean {' or '.join(same)}?"
    names = [known.rpartition(".")[2] for known in everywhere]
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {parent + '.' if parent else ''}{near[0]}?"
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"; did you mean {everywhere[names.index(near[0])]}?"
    return f"; known keys here: {', '.join(siblings)}"


def _bare(kind: Any) -> Any:
    """The section type within Optional[...] or Annotated[...]."""
    if typing.get_origin(kind) is Annotated:
        return _bare(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(kind) if arg is not types.NoneType]
        return _bare(inner[0]) if len(inner) == 1 else kind
    return kind


def _children(kind: Any) -> dict[str, Any]:
    """Field name -> type of a section; empty for anything else."""
    kind = _bare(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind is not Budget:
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {}


def _type_at(path: str, tree: type[BaseModel]) -> Any:
    kind: Any = tree
    for key in filter(None, path.split(".")):
        kind = _children(kind).get(key)
    return kind


def _paths(kind: Any, prefix: str = "") -> Iterator[str]:
    for name, child in _children(kind).items():
        yield f"{prefix}{name}"
        yield from _paths(child, f"{prefix}{name}.")
