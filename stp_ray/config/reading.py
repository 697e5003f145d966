"""A configuration from a recipe and overrides, and a recipe from a configuration."""

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import ConfigError
from ..recipes import recipe_folder, recipe_names
from ..uris import HOW_TO_MEND, credentials_in
from .messages import did_you_mean, one_line, shown
from .tree import RunConfig, dump_config
from .yaml12 import Dumper, parse


def load_config(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Read a recipe and apply overrides.

    Args:
        recipe: the name of a recipe that ships with the project, the path of a YAML file, or
            the content of one.
        overrides: "a.b.c=value" with the value in YAML; they win over the recipe, the last
            one over earlier ones, and a list replaces the whole list.

    Raises:
        ConfigError: naming the dotted path, what was found and what was expected.
    """
    if isinstance(recipe, RunConfig):
        content = dump_config(recipe)
    elif isinstance(recipe, Mapping):
        content = copy.deepcopy(dict(recipe))
    elif isinstance(recipe, (str, os.PathLike)):
        content = _read_recipe(recipe)
    else:
        raise ConfigError(
            f"the recipe is {recipe!r:.60}; expected the name of one, the path of a YAML file, or "
            "a mapping of keys to values"
        )
    if isinstance(overrides, str):
        raise ConfigError(f"overrides are {overrides!r}; expected a list: [{overrides!r}]")
    if not isinstance(overrides, Sequence) or not all(isinstance(each, str) for each in overrides):
        raise ConfigError(f"overrides are {overrides!r:.60}; expected a list of texts: ['seed=1']")
    for override in overrides:
        _override(content, override)
    try:
        for path, value in _leaves(content):
            _check_leaf(path, value)
    except RecursionError:
        raise ConfigError("the recipe holds itself; expected values without anchors") from None
    try:
        return RunConfig.model_validate_json(json.dumps(content), strict=True)
    except RecursionError:
        raise ConfigError("the recipe is nested too deeply; expected sections of values") from None
    except ValidationError as error:
        raise ConfigError(one_line(error, RunConfig)) from None


def _read_recipe(recipe: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(recipe)
    if not path.is_file() and os.fspath(recipe) in recipe_names():
        path = recipe_folder() / f"{os.fspath(recipe)}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not a file" if isinstance(error, FileNotFoundError) else f"unreadable: {error}"
        raise ConfigError(
            f"recipe {os.fspath(recipe)!r} {reason}; expected a YAML file or one of "
            f"{', '.join(recipe_names())}{did_you_mean(os.fspath(recipe), recipe_names())}"
        ) from None
    content = parse(text, f"recipe {path.name}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"recipe {path.name} holds {shown(content)}; expected a mapping of keys to values"
        )
    return content


def _override(content: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(
            f"override {override!r} is not of the form key=value; expected for example "
            "seed=1 or supernet.optimisation.lr=0.1"
        )
    section: Any = content
    for depth, key in enumerate(keys[:-1], start=1):
        child = {} if section.get(key) is None else section[key]
        if not isinstance(child, dict):
            raise ConfigError(
                f"{'.'.join(keys)} cannot be set: {'.'.join(keys[:depth])} is {shown(child)}, "
                "not a section"
            )
        section[key] = section = dict(child)  # its own, for an anchor may stand in several places
    section[keys[-1]] = parse(text, f"override {path.strip()}")


def _leaves(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            if not isinstance(key, str):
                raise ConfigError(
                    f"{path or 'the recipe'} has the key {shown(key)}; expected names as keys"
                )
            yield from _leaves(value, f"{path}.{key}" if path else key)
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from _leaves(value, f"{path}.{index}")
    else:
        yield path, content


def _check_leaf(path: str, value: Any) -> None:
    if isinstance(value, str):
        found = credentials_in(value)
        if found:
            raise ConfigError(f"{path} contains {found}; {HOW_TO_MEND}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} is {value}; expected a finite number")
    elif value is not None and not isinstance(value, bool | int | float):
        raise ConfigError(f"{path} is {shown(value)}; expected text, a number, true, false or null")


def to_yaml(config: RunConfig) -> str:
    """The resolved tree as a YAML recipe."""
    return yaml.dump(dump_config(config), Dumper=Dumper, sort_keys=False)
