"""Reads and writes configurations as YAML.

Scalars are those of YAML 1.2: ``1e-3`` is a number, and ``on`` and ``no`` are strings. A mapping with an anchor and its
aliases are one object, which is written with the same anchor.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from fxtrain.cli._errors import ConfigError
from fxtrain.core import truncate

_SCALARS = {  # the core schema of YAML 1.2, with the characters that each scalar can begin with
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?[0-9]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
    "merge": ("<<", ["<"]),
}


class Anchored(dict[str, Any]):
    """A mapping with an anchor."""

    anchor: str = ""


def anchored(anchor: str | None) -> dict[Any, Any]:
    """Returns an empty mapping with an anchor, if there is one."""
    if not anchor:
        return {}
    made = Anchored()
    made.anchor = anchor
    return made


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  # without those of YAML 1.1

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        node = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            vars(node)["anchor"] = event.anchor
        return node

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value, 16 if "x" in node.value else 10)  # a leading zero is not an octal number

    def construct_anchored(self, node: yaml.MappingNode) -> Any:
        """Yields a mapping before it is filled, because an alias in it may lead to itself."""
        made = anchored(vars(node)["anchor"])
        yield made
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag == "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        made.update(self.construct_mapping(node))


class _Dumper(yaml.SafeDumper):  # quotes what is another scalar in YAML 1.1 or in 1.2
    def represent_anchored(self, data: Anchored) -> yaml.Node:
        node = self.represent_dict(data)
        vars(node)["anchor"] = data.anchor
        return node

    def generate_anchor(self, node: yaml.Node) -> str:
        return vars(node).get("anchor") or super().generate_anchor(node)


for _tag, (_pattern, _first) in _SCALARS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_anchored)
_Dumper.add_representer(Anchored, _Dumper.represent_anchored)


def load(text: str, origin: str) -> Any:
    """Parses YAML.

    Args:
        text: The text.
        origin: Where it is from, for errors.

    Raises:
        ConfigError: The text is not YAML, or a mapping has a key twice. The message has the line.

    Example:
        >>> load("steps: 1e3\\non: &a {patience: 3}\\nagain: *a", "a string")
        {'steps': 1000.0, 'on': {'patience': 3}, 'again': {'patience': 3}}
        >>> load("a: 1\\na: 2", "run.yaml")
        Traceback (most recent call last):
        ...
        fxtrain.cli._errors.ConfigError: expected YAML in run.yaml, got the key 'a' twice in line 2. Correct the file.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}" if mark is not None else ""
        what = f"{error.problem}{where}"
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = truncate(" ".join(str(error).split()), 200) or type(error).__name__
    raise ConfigError(f"expected YAML in {origin}, got {what}. Correct the file.")


def dump(value: object) -> str:
    """Returns YAML that ``load`` parses to an equal value, with the same shared mappings and anchors.

    Args:
        value: Mappings, lists and scalars.

    Example:
        >>> shared = load("- &log {jsonl: {path: x}}\\n- *log", "a string")
        >>> print(dump({"writers": shared, "off": "no", "rate": 1e-5}), end="")
        writers:
        - &log
          jsonl:
            path: x
        - *log
        'off': 'no'
        rate: 1.0e-05
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)
