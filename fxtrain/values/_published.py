"""The values that an event publishes, by name."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from fxtrain.core import Control, EvalEnd, Logged, LoopEvent, StepEnd, describe
from fxtrain.values._kinds import KINDS, Value

_Metric = TypeVar("_Metric")


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
    named: dict[str, Value] = named_after(kind, event.metrics) if isinstance(event, StepEnd | EvalEnd) else {}
    for name, entry in control.log.items():
        if name in named:
            raise ValueError(
                f"expected {entry.owner or 'a callback'} to log under a new name, got {name!r}, a metric of "
                f"{kind.__name__}. Rename it."
            )
        named[name] = _loggable(name, entry)
    return named


_PREFIXES = {StepEnd: "train/", EvalEnd: "eval/"}


def named_after(kind: type[LoopEvent], metrics: Mapping[str, _Metric]) -> dict[str, _Metric]:
    """Returns metrics under the names that they are published under.

    Args:
        kind: ``StepEnd`` or ``EvalEnd``.
        metrics: Metrics by name.
    """
    prefix = _PREFIXES[kind]
    return {prefix + name: value for name, value in metrics.items()}


def _loggable(name: str, entry: Logged) -> Value:
    value = entry.value
    if isinstance(value, bool | int | float) or type(value) in KINDS:
        return value
    if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.ndim == 0):
        return float(value)
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
