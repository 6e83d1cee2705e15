"""Texts, and the configuration of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Scalar = bool | int | float


@dataclasses.dataclass(frozen=True)
class Text:
    """Text in Markdown.

    Raises:
        TypeError: ``markdown`` is not a string.

    Example:
        >>> Text("**greedy**: a cat sat on the mat")
        Text(markdown='**greedy**: a cat sat on the mat')
    """

    markdown: str

    def __post_init__(self) -> None:
        if not isinstance(self.markdown, str):
            raise TypeError(f"Text takes a string, and a {type(self.markdown).__name__} came: write Text(str(it)).")


@dataclasses.dataclass(frozen=True)
class HParams:
    """The configuration of a run: a nested mapping with strings, numbers and bools as leaves.

    Raises:
        TypeError: A key is not a string, or a leaf has another type.
        ValueError: Two leaves have the same flattened name.

    Example:
        >>> HParams({"batch": 32, "optim": {"name": "adamw", "lr": 3e-4}}).flat()
        {'batch': 32, 'optim/name': 'adamw', 'optim/lr': 0.0003}
    """

    values: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.flat()

    def flat(self) -> dict[str, str | Scalar]:
        """Returns a flat mapping, with the keys of each path joined by ``/``."""
        leaves: dict[str, str | Scalar] = {}

        def collect(prefix: str, value: Any) -> None:
            if isinstance(value, Mapping):
                for key, inner in value.items():
                    if not isinstance(key, str):
                        raise TypeError(f"{prefix or 'HParams'} has the key {key!r}: the keys are strings.")
                    collect(f"{prefix}/{key}" if prefix else key, inner)
            elif not isinstance(value, str | bool | int | float):
                raise TypeError(
                    f"{prefix or 'HParams'} is {value!r}, and a configuration has strings, numbers and bools at its "
                    "leaves: write it as a string, or leave it out."
                )
            elif prefix in leaves:
                raise ValueError(f"Two leaves of the configuration are called {prefix!r}: rename one.")
            else:
                leaves[prefix] = value

        if not isinstance(self.values, Mapping):
            raise TypeError(f"HParams takes a mapping, and a {type(self.values).__name__} came.")
        collect("", self.values)
        return leaves
