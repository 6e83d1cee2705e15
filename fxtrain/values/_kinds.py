"""The kinds of values that can be logged, their conversion to simpler kinds and to JSON, and the values of events."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping
from typing import TypeVar

import numpy as np
from torch import Tensor

from fxtrain.core import Control, EvalEnd, Json, Logged, LoopEvent, RunInfo, StepEnd, describe
from fxtrain.values._artifact import Artifact
from fxtrain.values._figure import Figure, WandbChart
from fxtrain.values._histogram import Histogram
from fxtrain.values._media import Audio, PointCloud
from fxtrain.values._pixels import Image, Video
from fxtrain.values._table import ConfusionMatrix, Table
from fxtrain.values._text import HParams, Scalar, Text

_Metric = TypeVar("_Metric")

Wrapped = (
    Text
    | Image
    | Video
    | Audio
    | Histogram
    | Table
    | Figure
    | ConfusionMatrix
    | PointCloud
    | HParams
    | RunInfo
    | Artifact
)
"""A value of one of the classes of this package."""

Value = Scalar | Tensor | np.ndarray | np.generic | Wrapped
"""A value that can be logged. Tensors and arrays that are not wrapped are 0-d."""

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
    RunInfo: "facts of a run",
    Artifact: "artifacts",
}
"""The kinds of values besides scalars, and their names in messages."""

KINDS_BY_NAME: Mapping[str, Kind] = {"scalars": float, **{name: kind for kind, name in KINDS.items()}}
"""All kinds of values by their names."""


def kind_of(value: object) -> Kind:
    """Returns the class of a value, with ``float`` for all scalars."""
    return type(value) if type(value) in KINDS else float


def kinds_logged(log: Mapping[str, Logged]) -> frozenset[Kind]:
    """Returns the kinds of the values in a log. A lazy log on a device has them as ``kinds``, and is not read."""
    kinds: frozenset[Kind] | None = getattr(log, "kinds", None)
    return frozenset(kind_of(entry.value) for entry in log.values()) if kinds is None else kinds


def plain_number(value: Value) -> Scalar | Wrapped:
    """Converts scalars of NumPy and torch to Python scalars.

    Raises:
        TypeError: If a scalar is no real number.
    """
    if type(value) is float or type(value) is int or isinstance(value, bool | Wrapped):
        return value
    number = value.item() if isinstance(value, Tensor | np.ndarray | np.generic) else float(value)
    if not isinstance(number, int | float):
        raise TypeError(
            f"expected a scalar to write to be a real number, got {describe(value)}. Write its real part or its "
            "absolute value."
        )
    return number


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
        case Figure() if value.kind in kinds:
            return value
        case Figure() if Image in kinds and value.kind is not WandbChart:
            return value.image()
        case ConfusionMatrix() if Image in kinds:
            return value.image()
        case ConfusionMatrix():
            return simplified(value.table(), kinds)
        case Table() if Text in kinds:
            return Text(value.markdown())
        case RunInfo() if Text in kinds:
            return Text("  \n".join(f"**{name}**: {text}" for name, text in value.texts().items()))
        case _:
            return None


_SIMPLER: Mapping[Kind, frozenset[Kind]] = {
    Figure: frozenset({Image}),
    ConfusionMatrix: frozenset({Image, Table, Text}),
    Table: frozenset({Text}),
}
"""The kinds that ``simplified`` converts values of a kind to."""


def is_kept(kind: Kind, kinds: Collection[Kind]) -> bool:
    """Whether values of a kind are of one of several kinds, or can be converted to one by ``simplified``.

    Args:
        kind: The kind of the values.
        kinds: The accepted kinds.

    Example:
        >>> is_kept(Table, {Text}), is_kept(Text, {Table})
        (True, False)
    """
    return kind in kinds or not _SIMPLER.get(kind, frozenset()).isdisjoint(kinds)


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


def published(event: LoopEvent, control: Control) -> dict[str, Value]:
    """Returns the values to write at an event, by name.

    The metrics of ``StepEnd`` are named ``train/<name>``, and those of ``EvalEnd`` ``eval/<name>``. Logged values keep
    their names.

    Args:
        event: Any event of the loop, with metrics as Python scalars.
        control: The control of the fold over the event.

    Returns:
        Scalars, and values of ``fxtrain.values``.

    Raises:
        TypeError: A logged value is neither.
        ValueError: A value was logged under the name of a metric.

    Example:
        >>> published(StepEnd(step=3, metrics={"loss": 0.5}), Control(log={"learning rate": 0.1}))
        {'train/loss': 0.5, 'learning rate': 0.1}
    """
    kind = type(event)
    named: dict[str, Value] = named_after(kind, getattr(event, "metrics")) if kind in METRIC_PREFIXES else {}  # noqa: B009
    for name, entry in control.log.items():
        if name in named:
            raise ValueError(
                f"expected {entry.owner or 'a callback'} to log under a new name, got {name!r}, a metric of "
                f"{kind.__name__}. Rename it."
            )
        named[name] = _loggable(name, entry)
    return named


METRIC_PREFIXES: Mapping[type[LoopEvent], str] = {StepEnd: "train/", EvalEnd: "eval/"}
"""The events whose metrics are published, and what their names begin with then."""


def named_after(kind: type[LoopEvent], metrics: Mapping[str, _Metric]) -> dict[str, _Metric]:
    """Returns metrics under the names that they are published under.

    Args:
        kind: ``StepEnd`` or ``EvalEnd``.
        metrics: Metrics by name.
    """
    prefix = METRIC_PREFIXES[kind]
    return {prefix + name: value for name, value in metrics.items()}


def _loggable(name: str, entry: Logged) -> Value:
    value = entry.value
    if isinstance(value, bool | int | float) or type(value) in KINDS:
        return value
    check_loggable(name, entry)
    return float(value)


def check_loggable(name: str, entry: Logged) -> None:
    """Raises unless a logged value is a scalar or a value of ``fxtrain.values``.

    Args:
        name: The name of the value.
        entry: The value, with the name of its callback.

    Raises:
        TypeError: The message names the callback and a class to wrap the value in.
    """
    value = entry.value
    is_scalar = isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.ndim == 0)
    if is_scalar or type(value) in KINDS:
        return
    if isinstance(value, Tensor):
        remedy = "Reduce it to a scalar, or wrap it, for example in Histogram."
    elif isinstance(value, str):
        remedy = "Wrap it in Text."
    else:
        remedy = f"Wrap it in one of {', '.join(kind.__name__ for kind in KINDS)}."
    raise TypeError(
        f"expected {entry.owner or 'a callback'} to log a scalar or a value of fxtrain.values as {name!r}, got "
        f"{describe(value)}. {remedy}"
    )
