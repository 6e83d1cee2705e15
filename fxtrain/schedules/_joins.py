"""Schedules one after another, and one schedule repeated."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxtrain.core import Scalar, check_int, check_positive_int
from fxtrain.schedules._schedule import Schedule, as_value, refuse_unless_schedule, schedule_of, wide


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Joins schedules one after another, each from its own step 0.

    Args:
        schedules: The schedules, one more than boundaries.
        boundaries: The steps at which the next schedule begins, increasing.

    Example:
        >>> from fxtrain.schedules import constant, linear
        >>> schedule = join([constant(1.0), linear(1.0, 0.0, transition_steps=10)], [100])
        >>> float(schedule(99)), float(schedule(105))
        (1.0, 0.5)
    """
    if len(schedules) != len(boundaries) + 1:
        raise ValueError(
            f"expected one more schedule than boundaries, got {len(schedules)} schedules and {len(boundaries)} "
            "boundaries."
        )
    for index, schedule in enumerate(schedules):
        refuse_unless_schedule(f"schedules[{index}]", schedule)
    for index, boundary in enumerate(boundaries):
        check_int(f"boundaries[{index}]", boundary, minimum=0)
    if list(boundaries) != sorted(set(boundaries)):
        raise ValueError(f"expected boundaries to be increasing, got {list(boundaries)}.")

    def value(step: Tensor) -> Scalar:
        found = as_value(schedules[0](step), step)
        for boundary, schedule in zip(boundaries, schedules[1:], strict=True):
            found = torch.where(step < boundary, found, as_value(schedule((step - boundary).clamp(min=0)), step))
        return found

    return schedule_of(value)


def cycle(schedule: Schedule, period: int, *, growth: int = 1, mirror: bool = False) -> Schedule:
    """Repeats the first ``period`` steps of a schedule.

    Args:
        schedule: The schedule to repeat. With ``growth``, it is called with fractional steps in float64.
        period: The length of the first cycle; positive.
        growth: The ratio of each cycle's length to that of the previous one. The schedule is stretched to fit.
        mirror: Whether every second cycle runs backwards, so that the value never jumps.

    Raises:
        ValueError: If ``period`` or ``growth`` is not positive, or if ``growth`` and ``mirror`` are combined.

    Example:
        >>> from fxtrain.schedules import linear
        >>> [float(cycle(linear(0.0, 1.0, transition_steps=2), 2)(step)) for step in range(5)]
        [0.0, 0.5, 0.0, 0.5, 0.0]
        >>> [float(cycle(linear(0.0, 1.0, transition_steps=2), 2, mirror=True)(step)) for step in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.0]

    References:
        Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017.
    """
    refuse_unless_schedule("schedule", schedule)
    check_positive_int("period", period)
    check_positive_int("growth", growth)
    if mirror and growth != 1:
        raise ValueError(f"expected growth=1 with mirror=True, got {growth}. Leave one of them out.")

    def grown(step: Tensor) -> Scalar:
        # Cycle k begins at period (growth^k - 1) / (growth - 1). The logarithm may miss by one at a boundary.
        exact = wide(step)
        cycles = torch.log1p(exact * (growth - 1) / period).div(math.log(growth)).round()
        start = period * (growth**cycles - 1) / (growth - 1)
        cycles = torch.where(exact < start, cycles - 1, cycles)
        start = period * (growth**cycles - 1) / (growth - 1)
        return schedule((exact - start) / growth**cycles)

    def value(step: Tensor) -> Scalar:
        if growth > 1:
            return grown(step)
        if mirror:
            return schedule(period - (step % (2 * period) - period).abs())
        return schedule(step % period)

    return schedule_of(value)
