"""Texts, and the configuration of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fxtrain.core import Json, Record, describe, plain_config, register_node, truncate
from fxtrain.core._html import html_view

Scalar = bool | int | float
"""A Python number."""

_MAX_REPR = 500  # characters


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Text(Record):
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

    @classmethod
    def written(cls, write: Callable[..., str], *values: Tensor) -> Text:
        """Returns a text of numbers that may be on a device, which are read only if the text is published.

        Args:
            write: ``write(*numbers)`` returns the Markdown.
            values: Tensors of shape [], passed to ``write`` as Python scalars.

        Example:
            >>> import torch
            >>> Text.written("loss {:.2f} at step {}".format, torch.tensor(0.5), torch.tensor(7))
            Text(markdown='loss 0.50 at step 7')
        """
        return _unflattened((write,), values)

    def __getattr__(self, name: str) -> str:
        # Called only while the field is not set, as the text is not written yet.
        if name != "markdown" or "_write" not in vars(self):
            raise AttributeError(f"expected an attribute of Text, got {name!r}. Its text is .markdown.")
        numbers = [value.item() if isinstance(value, Tensor) else value for value in vars(self)["_values"]]
        object.__setattr__(self, "markdown", vars(self)["_write"](*numbers))
        return self.markdown

    def __repr__(self) -> str:
        return f"Text(markdown={truncate(repr(self.markdown), _MAX_REPR)})"

    @html_view
    def _repr_html_(self) -> str:
        from fxtrain.values._views import text_view

        return text_view(self)


def _flattened(text: Text) -> tuple[tuple[Any, ...], tuple[object]]:
    """Returns the numbers of a text, and the function that writes it or the text itself."""
    known = vars(text)
    return (known["_values"], (known["_write"],)) if "_write" in known else ((), (text.markdown,))


def _unflattened(context: Any, values: Any) -> Text:
    if isinstance(context[0], str):
        return Text(context[0])
    text = object.__new__(Text)
    object.__setattr__(text, "_write", context[0])
    object.__setattr__(text, "_values", tuple(values))
    return text


register_node(Text, _flattened, _unflattened)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HParams(Record):
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
            raise TypeError(f"expected HParams of a mapping, got {describe(self.values)}. Pass a dict.")
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
