"""The kinds of values that can be logged, and their conversion to simpler kinds and to JSON."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
from torch import Tensor

from fxtrain.values._histogram import Histogram
from fxtrain.values._media import Audio, Figure, Image, PointCloud, Video
from fxtrain.values._table import ConfusionMatrix, Table
from fxtrain.values._text import HParams, Scalar, Text

Wrapped = Text | Image | Video | Audio | Histogram | Table | Figure | ConfusionMatrix | PointCloud | HParams
"""A value of one of the classes of this package."""

Value = Scalar | Tensor | np.ndarray | np.generic | Wrapped
"""A value that can be logged. Tensors and arrays that are not wrapped are 0-d."""

Json = str | int | float | None | dict[str, "Json"] | list["Json"]
"""A value that ``json`` can represent."""

Kind = type[object]
"""A class of values. ``float`` stands for scalars of any type."""

KINDS: Mapping[Kind, str] = {
    Text: "texts",
    Image: "images",
    Video: "videos",
    Audio: "sounds",
    Histogram: "histograms",
    Table: "tables",
    Figure: "figures",
    ConfusionMatrix: "confusion matrices",
    PointCloud: "point clouds",
    HParams: "hyper-parameters",
}
"""The kinds of values besides scalars, and their names in messages."""


def kind_of(value: object) -> Kind:
    """Returns the class of a value, with ``float`` for all scalars."""
    return type(value) if type(value) in KINDS else float


def plain_number(value: Value) -> Scalar | Wrapped:
    """Converts scalars of NumPy and torch to Python scalars."""
    if type(value) is float or type(value) is int or isinstance(value, bool | Wrapped):
        return value
    return value.item() if isinstance(value, Tensor | np.ndarray | np.generic) else float(value)


def simplified(value: Value, kinds: Collection[Kind]) -> Value | None:
    """Converts a value to one of several kinds, or returns None if none of them can represent it.

    Args:
        value: The value.
        kinds: The accepted kinds. A value of one of them is returned as it is.

    Example:
        >>> simplified(Table({"word": ["cat"]}), {Text})
        Text(markdown='| word |\\n| --- |\\n| cat |')
    """
    if kind_of(value) in kinds:
        return value
    match value:
        case Figure() if Image in kinds:
            return value.image()
        case ConfusionMatrix() if Image in kinds:
            return value.image()
        case ConfusionMatrix():
            return simplified(value.table(), kinds)
        case Table() if Text in kinds:
            return Text(value.markdown())
        case _:
            return None


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
