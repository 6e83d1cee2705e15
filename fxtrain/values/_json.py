"""Conversion of values to types that JSON can represent."""

from __future__ import annotations

import math
from collections.abc import Mapping

Json = str | int | float | None | dict[str, "Json"] | list["Json"]
"""A value that ``json`` can represent."""


def jsonable(value: object) -> Json:
    """Converts a value to types that JSON can represent.

    Non-finite floats become strings that ``float`` can parse. Objects of other types become their ``str``.

    Example:
        >>> jsonable({"loss": float("-inf"), "shape": (2, 3), "lr": float("nan")})
        {'loss': '-Infinity', 'shape': [2, 3], 'lr': 'NaN'}
    """
    match value:
        case str() | int() | None:
            return value
        case float():
            return value if math.isfinite(value) else "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
        case Mapping():
            return {str(name): jsonable(inner) for name, inner in value.items()}
        case list() | tuple():
            return [jsonable(inner) for inner in value]
        case _:
            return str(value)
