"""YAML 1.2, for which PyYAML, which reads 1.1, is told other scalars."""

import re
from typing import Any

import yaml

from ..errors import ConfigError


class Loader(yaml.SafeLoader):
    """`off` is a string, `1e-3` a number; a repeated key is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here a node still holds what was written: construction adds what it merges.
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.composer.ComposerError(
                    None, None, f"the key {key!r} appears twice", node.start_mark
                )
        return node


Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's


class Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


def _integer(loader: Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0 if re.match(r"0[xo]", text) else 10)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""]
        )

Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse(text: str, source: str) -> Any:
    """The content of a text, or a `ConfigError` that names its source and the line."""
    try:
        return yaml.load(text, Loader=Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{where} is not valid YAML: {error.problem}") from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply; expected sections of values") from None
    except (yaml.YAMLError, ValueError, AttributeError, KeyError) as error:  # a tag's own, but one
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
