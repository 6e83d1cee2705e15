"""Published: what is to be written at an event, by name."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxtrain.core import Control, EvalEnd, Logged, StepEnd
from fxtrain.values._log import KINDS


def published(event: Any, control: Control) -> dict[str, Any]:
    """What is to be written at an event, by name.

    The metrics of ``StepEnd`` are called ``train/<name>``, those of ``EvalEnd`` ``eval/<name>``; what was logged keeps
    its name.

    Args:
        event: Any event of the loop, with numbers for metrics.
        control: What was asked at it.

    Returns:
        Numbers, and values of this module.

    Raises:
        TypeError: If something else was logged.
        ValueError: If something was logged under the name of a metric.

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
    """The metrics of a ``StepEnd`` or an ``EvalEnd``, under the names that they are published under."""
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
