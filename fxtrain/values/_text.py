"""Texts, and the configuration of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fxtrain.core import Json, describe, plain_config

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
    """The configuration of a run, a nested mapping. ``fxtrain.RunInfo`` lists the types of its values.

    Raises:
        TypeError: A key is not a string, or a value has another type.
        ValueError: Two values have the same flattened name.

    Example:
        >>> HParams({"batch": 32, "optim": {"name": "adamw", "lr": 3e-4}}).flat()
        {'batch': 32, 'optim/name': 'adamw', 'optim/lr': 0.0003}
    """

    values: Mapping[str, object]

    def __post_init__(self) -> None:
        self.flat()

    def flat(self) -> dict[str, Json]:
        """Returns a flat mapping, with the keys of each path joined by ``/``. Lists and None are kept."""
        leaves: dict[str, Json] = {}

        def collect(prefix: str, value: Json) -> None:
            if isinstance(value, dict):
                for key, inner in value.items():
                    collect(f"{prefix}/{key}" if prefix else key, inner)
            elif prefix in leaves:
                raise ValueError(f"expected HParams with distinct names, got {prefix!r} twice. Rename one.")
            else:
                leaves[prefix] = value

        if not isinstance(self.values, Mapping):
            raise TypeError(f"expected HParams of a mapping, got {describe(self.values)}.")
        collect("", plain_config(self.values))
        return leaves

    def scalars(self) -> dict[str, str | Scalar]:
        """Returns the flat mapping with lists and None as text, for writers without these types.

        Example:
            >>> HParams({"optim": {"betas": [0.9, 0.99], "decay": None}}).scalars()
            {'optim/betas': '[0.9, 0.99]', 'optim/decay': 'None'}
        """
        return {
            name: value if isinstance(value, str | bool | int | float) else str(value)
            for name, value in self.flat().items()
        }
