"""Changes of a configuration on the command line, as ``callbacks[0].early_stopping.patience=5``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from fxtrain.cli._errors import ConfigError
from fxtrain.cli._type_checks import shown
from fxtrain.cli._yaml import load

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
        node: Any = config
        here, way = _first(node, _parts(key), key)
        while way:
            # A mapping is created in place of none. Reading the configuration finds wrong names.
            if isinstance(node, list) or node.get(here) is not None:
                node = node[here]
            else:
                node[here] = node = {}
            here, way = _first(node, way, key)
        node[here] = load(value, f"the value of {key}")


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


def _first(node: Any, way: list[str | int], key: str) -> tuple[Any, list[str | int]]:
    """Returns the key or index in a node with which a way begins, and the rest of the way."""
    if isinstance(node, dict) and isinstance(way[0], str):
        # A dotted name is one key. The longest key that exists is meant.
        texts = list(itertools.takewhile(lambda part: isinstance(part, str), way))
        names = {count: ".".join(map(str, texts[:count])) for count in range(len(texts), 0, -1)}
        count = next((count for count, name in names.items() if name in node), 1)
        return names[count], way[count:]
    if isinstance(node, list) and isinstance(way[0], int):
        if way[0] < len(node):
            return way[0], way[1:]
        raise ConfigError(f"expected an index below {len(node)} in {key}, got {way[0]}. Correct the index.")
    kind = "a list" if isinstance(way[0], int) else "a mapping"
    raise ConfigError(f"expected {kind} before {way[0]!r} in {key}, got {shown(node)}.")
