"""The values that an event publishes, by name."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxtrain.core import Control, EvalEnd, Logged, StepEnd
from fxtrain.values._log import KINDS


def published(event: Any, control: Control) -> dict[str, Any]:
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
    named = named_after(kind, event.metrics) if kind in _PREFIXES else {}
    for name, entry in control.log.items():
        if name in named:
            raise ValueError(
                f"{entry.owner or 'A callback'} logged {name!r}, and that is the name of a metric of "
                f"{kind.__name__}: log it under another name."
            )
        named[name] = _loggable(name, entry)
    return named


_PREFIXES = {StepEnd: "train/", EvalEnd: "eval/"}


def named_after(kind: type[Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Returns metrics under the names that they are published under.

    Args:
        kind: ``StepEnd`` or ``EvalEnd``.
        metrics: Metrics by name.
    """
    prefix = _PREFIXES[kind]
    return {prefix + name: value for name, value in metrics.items()}


def _loggable(name: str, entry: Logged) -> Any:
    value = entry.value
    if isinstance(value, bool | int | float) or type(value) in KINDS:
        return value
    if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.ndim == 0):
        return float(value)
    if isinstance(value, Tensor):
        remedy = "reduce it to a number, or log Histogram(it), or what else of fxtrain.values it is."
    elif isinstance(value, str):
        remedy = "log Text(it)."
    else:
        remedy = f"log a number, or one of fxtrain.values: {', '.join(kind.__name__ for kind in KINDS)}."
    came = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise TypeError(f"{entry.owner or 'A callback'} logged {name!r}, which is {came}: {remedy}")
