"""Returned: what users' functions give back, checked and named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxtrain.fold.subscription import name_of
from fxtrain.metrics import Metric


def loss_and_metrics(function: Any, result: Any) -> tuple[Tensor, dict[str, Any]]:
    """A loss, with the metrics that came beside it or without any.

    Raises:
        TypeError: If it is neither; the message says what came.
        ValueError: If a metric has the loss's name.
    """
    loss, metrics = result, {}
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        loss, metrics = result
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        raise TypeError(
            f"{name_of(function)} returned {described(result)}: a loss function returns a 0-d floating tensor, or that "
            "and a dict of metrics. A loss of each example is reduced with .mean()."
        )
    if "loss" in metrics:
        raise ValueError(
            f"{name_of(function)} returned a metric named 'loss', which is the loss's own name: rename it."
        )
    return loss, checked_metrics(function, metrics)


def checked_metrics(function: Any, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics, if they are some.

    Raises:
        TypeError: If a value is neither a 0-d tensor nor a metric.
    """
    for name, value in metrics.items():
        if not isinstance(value, Metric) and not (isinstance(value, Tensor) and value.ndim == 0):
            raise TypeError(
                f"{name_of(function)} returned the metric {name!r} as {described(value)}: a 0-d tensor is wanted, or "
                "one of fxtrain.metrics."
            )
    return dict(metrics)


def described(value: Any) -> str:
    """What a value is, in an error.

    Example:
        >>> import torch
        >>> described((torch.zeros(2), None, 1.0))
        'a tuple of (a float32 tensor of shape [2], None, a value of type float)'
    """
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of ({', '.join(described(part) for part in value)})"
    return "None" if value is None else f"a value of type {type(value).__name__}"
