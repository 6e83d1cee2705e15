"""Texts, and the configuration of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fxtrain.core import describe

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
            raise TypeError(f"expected markdown to be a string, got {describe(self.markdown)}. Convert it with str.")


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

    values: Mapping[str, object]

    def __post_init__(self) -> None:
        self.flat()

    def flat(self) -> dict[str, str | Scalar]:
        """Returns a flat mapping, with the keys of each path joined by ``/``."""
        leaves: dict[str, str | Scalar] = {}

        def collect(prefix: str, value: object) -> None:
            if isinstance(value, Mapping):
                for key, inner in value.items():
                    if not isinstance(key, str):
                        raise TypeError(f"expected string keys in {prefix or 'HParams'}, got {describe(key)}.")
                    collect(f"{prefix}/{key}" if prefix else key, inner)
            elif not isinstance(value, str | bool | int | float):
                raise TypeError(
                    f"expected {prefix or 'HParams'} to be a string, number or bool, got {describe(value)}. Convert "
                    "it to a string, or leave it out."
                )
            elif prefix in leaves:
                raise ValueError(f"expected HParams with distinct names, got {prefix!r} twice. Rename one.")
            else:
                leaves[prefix] = value

        if not isinstance(self.values, Mapping):
            raise TypeError(f"expected HParams of a mapping, got {describe(self.values)}.")
        collect("", self.values)
        return leaves
