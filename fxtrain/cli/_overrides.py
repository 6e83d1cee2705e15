"""Changes of a configuration on the command line, as ``callbacks[0].early_stopping.patience=5``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fxtrain.cli._errors import ConfigError
from fxtrain.cli._type_checks import shown
from fxtrain.cli._yaml import load
from fxtrain.core import did_you_mean

_PART = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")


def override(config: dict[str, Any], changes: Sequence[str]) -> None:
    """Changes values of a configuration in place. A mapping with aliases changes for all of them.

    Args:
        config: The configuration.
        changes: Each is ``KEY=VALUE`` with the path of a key, as in errors, and a value in YAML.

    Raises:
        ConfigError: A change has another form, or the path leads through a value that is no mapping or list.

    Example:
        >>> config = {"steps": 9, "callbacks": [{"early_stopping": {"metric": "loss", "patience": 3}}]}
        >>> override(config, ["steps=1e2", "callbacks[0].early_stopping.patience=5"])
        >>> config
        {'steps': 100.0, 'callbacks': [{'early_stopping': {'metric': 'loss', 'patience': 5}}]}
    """
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise ConfigError(f"expected KEY=VALUE, got {change!r}. Write a change as steps=100.")
        *way, last = _parts(key)
        node: Any = config
        while way:
            node, way = _below(node, way, key)
        node, [last] = _at_last(node, [last], key)
        node[last] = load(value, f"the value of {key}")


def _parts(key: str) -> list[str | int]:
    parts: list[str | int] = []
    end = 0
    for match in _PART.finditer(key):
        if match.start() != end:
            break
        parts.append(match[1] if match[1] is not None else int(match[2]))
        end = match.end()
    if end != len(key):
        raise ConfigError(f"expected a key such as callbacks[0].early_stopping.patience, got {key!r}. Correct it.")
    return parts


def _below(node: Any, way: list[str | int], key: str) -> tuple[Any, list[str | int]]:
    """Returns the node that the first parts of a way lead to, and the other parts. Creates missing mappings."""
    if isinstance(node, dict) and isinstance(way[0], str):
        # A dotted name is one key. The longest key that exists is meant.
        texts = way[: next((index for index, part in enumerate(way) if isinstance(part, int)), len(way))]
        for count in range(len(texts), 0, -1):
            name = ".".join(map(str, texts[:count]))
            if name in node:
                return node[name], way[count:]
        return node.setdefault(way[0], {}), way[1:]
    node, way = _at_last(node, way, key)
    return node[way[0]], way[1:]


def _at_last(node: Any, way: list[str | int], key: str) -> tuple[Any, list[str | int]]:
    if isinstance(node, dict) and isinstance(way[0], str):
        return node, way
    if isinstance(node, list) and isinstance(way[0], int):
        if way[0] < len(node):
            return node, way
        raise ConfigError(f"expected an index below {len(node)} in {key}, got {way[0]}. Correct the index.")
    kind = "a list" if isinstance(way[0], int) else "a mapping"
    names = node if isinstance(node, dict) else ()
    raise ConfigError(f"expected {kind} before {way[0]!r} in {key}, got {shown(node)}.{did_you_mean(way[0], names)}")
