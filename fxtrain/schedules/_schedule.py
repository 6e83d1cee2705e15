"""What a schedule is, and the conversion of a function of the step to one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxtrain.core import Scalar, describe, wide_dtype
from fxtrain.equivalents import refuse_foreign

Schedule = Callable[[Tensor], Tensor]
"""Maps the step (int64 []) to a value (float64 []). Those of this package take Python ints too."""


def schedule_of(value: Callable[[Tensor], Scalar]) -> Schedule:
    """Returns the schedule that computes ``value`` from the step as a tensor, in float64.

    Args:
        value: A function of the step (int64 []).

    Example:
        >>> schedule_of(lambda step: 0.5 * step)(3)
        tensor(1.5000, dtype=torch.float64)
    """

    def schedule(step: int | Tensor) -> Tensor:
        count = torch.as_tensor(step)
        return as_value(value(count), count)

    return schedule


def refuse_unless_schedule(argument: str, schedule: object) -> None:
    """Raises unless ``schedule`` is a function. For torch and optax schedulers, the error has the equivalent."""
    refuse_foreign(argument, "a schedule", schedule, as_schedule=True)
    if not callable(schedule):
        raise TypeError(
            f"expected {argument} to be a function of the step, got {describe(schedule)}. For a constant, use "
            "fx.schedules.constant."
        )


def wide(step: Tensor) -> Tensor:
    """Returns the step in float64, or in float32 on a device without float64."""
    # float32 cannot represent all steps past 2^24, and the error of powers of a factor near 1 grows with the step.
    return step.to(wide_dtype(step.device))


def past(step: Tensor, boundary: float) -> Tensor:
    """Returns the number of steps since a boundary, negative before it."""
    # An integer tensor minus a float would be float32.
    return wide(step - boundary) if isinstance(boundary, int) else wide(step) - boundary


def as_value(value: Scalar, step: Tensor) -> Tensor:
    """Returns a value in the dtype of schedules, on the device of the step."""
    return torch.as_tensor(value, dtype=wide_dtype(step.device), device=step.device)
