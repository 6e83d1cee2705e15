"""Watched: the metric that a callback decides by, and which way it is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain.core import wide_dtype
from fxtrain.fold import Handler, needs

Metric = str | Callable[[Mapping[str, Any]], Any]
"""A metric's name, or a function of all metrics of an event, as ``lambda metrics: metrics["loss"] / 2``."""

Better = Callable[[Tensor, Tensor], Tensor]
"""From a value and the best one so far, each float [], to whether it is an improvement: bool []."""


def called(metric: Metric) -> str:
    """The metric's name, in reasons and errors."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", repr(metric))


def measured(event: Any, metric: Metric, who: str, device: torch.device) -> Tensor:
    """The metric at an event: a tensor of shape [] on ``device``, as precise as it was measured.

    float32 and float64 stay what they are, so a threshold is compared in the metric's own dtype: an accuracy of 0.9 in
    float32 reaches 0.9. Half precision becomes float32; integers and Python numbers become float64.

    Raises:
        KeyError: If there is none of this name, with those that there are.
    """
    if callable(metric):
        value = metric(event.metrics)
    elif metric in event.metrics:
        value = event.metrics[metric]
    else:
        there = ", ".join(map(repr, event.metrics)) or "none"
        source = "eval_step" if type(event).__name__ == "EvalEnd" else "the step"
        raise KeyError(
            f"{who} watches {metric!r}, and {type(event).__name__} has {there}: let {source} measure it, or name "
            "one of these."
        )
    if isinstance(value, bool | int | float):
        return torch.tensor(value, dtype=wide_dtype(device), device=device)
    value = torch.as_tensor(value, device=device)
    return value.to(
        torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else wide_dtype(device)
    )


def needing(callback: Handler, metric: Metric) -> Handler:
    """The callback, which says that it needs this metric of the evaluation. What a function looks at nobody knows."""
    return needs(callback, eval_metrics=[metric]) if isinstance(metric, str) else callback


class Direction(NamedTuple):
    """Which way a metric is better.

    ``better(value, best)`` is whether ``value`` is an improvement, compared in its own dtype. Anything improves on
    ``worst``.
    """

    better: Better
    worst: float
    sign: float  # 1 where less is better, -1 where more is, nan where a function says


def direction(mode: str | Better, *, min_delta: float = 0.0, relative: bool = False) -> Direction:
    """The direction that ``mode`` names.

        min:  value < best - min_delta            relative:  value < best - min_delta |best|
        max:  value > best + min_delta            relative:  value > best + min_delta |best|

    Anything improves on a best that is not finite, but a NaN never improves on anything.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if not (isinstance(min_delta, int | float) and math.isfinite(min_delta) and min_delta >= 0):
        raise ValueError(f"min_delta={min_delta!r}: a number, 0 or more, is wanted; `mode` says which way is better.")
    if callable(mode):
        if min_delta or relative:
            raise ValueError(
                "mode is a function, which says itself by how much a value has to be better: leave out "
                "min_delta and relative."
            )
        return Direction(lambda value, best: mode(value, best.to(value.dtype)), math.nan, math.nan)
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r}: 'min', 'max' or a function (value, best) -> bool tensor is wanted.")
    sign = 1.0 if mode == "min" else -1.0

    def better(value: Tensor, best: Tensor) -> Tensor:
        best = best.to(value.dtype)
        margin = min_delta * best.abs() if relative else torch.full_like(best, min_delta)
        # An infinite best would make the relative margin infinite too.
        return sign * value < torch.where(best.isfinite(), sign * best - margin, sign * best)

    return Direction(better, sign * math.inf, sign)
