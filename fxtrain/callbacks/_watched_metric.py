"""The metric that a callback watches, and the direction in which it improves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core import (
    EvalEnd,
    Metrics,
    StepEnd,
    TrainState,
    Updated,
    check_choice,
    describe,
    did_you_mean,
    wide_dtype,
)
from fxtrain.fold import Handler, needs

Metric = str | Callable[[Metrics], Tensor | float]
"""A metric's name, or a function of all metrics of an event, such as ``lambda metrics: metrics["loss"] / 2``."""

Better = Callable[[Tensor, Tensor], Tensor]
"""Maps a value and the best one so far, float [] each, to whether the value is an improvement: bool []."""


def called(metric: Metric) -> str:
    """Returns the metric's name, for reasons and errors.

    Raises:
        TypeError: If the metric is neither a string nor a function.
    """
    if not isinstance(metric, str) and not callable(metric):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected metric to be a name or a function of all metrics, got {describe(metric)}. Name it first, as in "
            'early_stopping("loss", patience=5).'
        )
    return metric if isinstance(metric, str) else getattr(metric, "__name__", repr(metric))


def measured(event: StepEnd | EvalEnd | Updated, metric: Metric, who: str, device: torch.device) -> Tensor:
    """Returns the metric at an event, as a tensor of shape [] on ``device`` in its own precision.

    float32 and float64 are kept, so a threshold is compared in the metric's own dtype: a float32 accuracy of 0.9
    reaches 0.9. Half precision becomes float32. Integers and Python scalars become ``wide_dtype``.

    Args:
        event: An event with metrics.
        metric: Name or function.
        who: The callback, for errors.
        device: Device of the result.

    Raises:
        KeyError: If the event has no metric of that name.
    """
    if callable(metric):
        value = metric(event.metrics)
    elif metric in event.metrics:
        value = event.metrics[metric]
    else:
        there = ", ".join(map(repr, event.metrics)) or "none"
        source = "eval_step" if type(event).__name__ == "EvalEnd" else "the step"
        raise KeyError(
            f"expected the metric {metric!r} at {type(event).__name__} for {who}, got {there}."
            f"{did_you_mean(metric, event.metrics)} Return it from {source}, or name one of these."
        )
    if isinstance(value, bool | int | float):
        return torch.tensor(value, dtype=wide_dtype(device), device=device)
    value = torch.as_tensor(value, device=device)
    return value.to(
        torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else wide_dtype(device)
    )


def needing(callback: Handler, metric: Metric) -> Handler:
    """Returns the callback with the evaluation metric declared as needed. A function's metrics are unknown."""
    return needs(callback, eval_metrics=[metric]) if isinstance(metric, str) else callback


def sign_of(mode: str) -> float:
    """Returns 1 for the mode ``"min"`` and -1 for ``"max"``: a metric times its sign is better if it is lower.

    Raises:
        ValueError: If the mode is neither.
    """
    check_choice("mode", mode, ("min", "max"))
    return 1.0 if mode == "min" else -1.0


def direction(mode: str | Better, *, min_delta: float = 0.0, relative: bool = False) -> tuple[Better, float]:
    """Returns the direction in which a metric improves.

        min:  value < best - min_delta            relative:  value < best - min_delta |best|
        max:  value > best + min_delta            relative:  value > best + min_delta |best|

    An infinite best is compared without a margin. NaN is never an improvement.

    Args:
        mode: ``"min"``, ``"max"`` or a function.
        min_delta: The margin, 0 or more.
        relative: Whether the margin is a fraction of the best value.

    Returns:
        Whether a value is an improvement on the best one, compared in its own dtype, and the worst value, on which any
        finite one improves.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not (isinstance(min_delta, int | float) and math.isfinite(min_delta) and min_delta >= 0):
        raise ValueError(
            f"expected min_delta to be a finite number of at least 0, got {describe(min_delta)}. Set the direction "
            "with mode=."
        )
    if callable(mode):
        if min_delta or relative:
            raise ValueError(
                "expected mode to be 'min' or 'max' with min_delta or relative, got a function. Apply the margin in "
                "the function, or leave out min_delta and relative."
            )
        return lambda value, best: mode(value, best.to(value.dtype)), math.nan
    if mode not in ("min", "max"):
        raise ValueError(
            f"expected mode to be 'min', 'max' or a function (value, best) -> bool tensor, got {describe(mode)}."
            f"{did_you_mean(mode, ('min', 'max'))}"
        )
    sign = sign_of(mode)

    def better(value: Tensor, best: Tensor) -> Tensor:
        best = best.to(value.dtype)
        margin = min_delta * best.abs() if relative else torch.full_like(best, min_delta)
        # An infinite best has no margin, because inf - inf is nan.
        return sign * value < torch.where(best.isfinite(), sign * best - margin, sign * best)

    return better, sign * math.inf


class Best(NamedTuple):
    """The best value of a metric so far. Also the state of ``save_best``."""

    best: Tensor  # float64 []: before the first, the worst value (nan if mode is a function)
    step: Tensor  # int64 []: its step; -1 before the first


def no_best(state: TrainState, worst: float) -> Best:
    """Returns the best value before the first, for a callback's initial state."""
    best = torch.tensor(worst, dtype=wide_dtype(state.step.device), device=state.step.device)
    return Best(best, torch.full_like(state.step, -1))


def improve(
    best: Best, value: Tensor, step: Tensor, better: Better, *, unless: Tensor | None = None
) -> tuple[Best, Tensor]:
    """Returns the best value after an evaluation, and whether it improved, bool [].

    Args:
        best: The best value before.
        value: The value of the evaluation, of shape []. NaN is never an improvement.
        step: int64 []. Its step.
        better: From ``direction``.
        unless: bool []. Evaluations that are ignored.
    """
    improved = better(value, best.best) & ~value.isnan()
    if unless is not None:
        improved = improved & ~unless
    kept = torch.where(improved, value.to(best.best.dtype), best.best)
    return Best(kept, torch.where(improved, step, best.step)), improved
