"""Linear warmup before another schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from fxtrain.core import Scalar, check_int
from fxtrain.schedules._decays import cosine
from fxtrain.schedules._schedule import Schedule, refuse_unless_schedule, schedule_of, wide


def warmup(schedule: Schedule, steps: int, *, init_value: Scalar = 0.0) -> Schedule:
    """Linear warmup to the first value of ``schedule``, followed by ``schedule`` from its step 0.

    Args:
        schedule: The schedule after the warmup.
        steps: The length of the warmup; 0 for none.
        init_value: The value at step 0.

    Example:
        >>> schedule = warmup(cosine(1.0, 90), 10)
        >>> [float(schedule(step)) for step in (0, 5, 10, 100)]
        [0.0, 0.5, 1.0, 0.0]
    """
    refuse_unless_schedule("schedule", schedule)
    check_int("steps", steps, minimum=0)
    if steps == 0:
        return schedule

    def value(step: Tensor) -> Scalar:
        peak = schedule(torch.zeros_like(step))
        rising = init_value + (peak - init_value) * (wide(step) / steps)
        return torch.where(step < steps, rising, schedule((step - steps).clamp(min=0)))

    return schedule_of(value)


def warmup_cosine_decay(
    init_value: Scalar,
    peak_value: float,
    *,
    warmup_steps: int,
    decay_steps: int,
    end_value: float = 0.0,
    exponent: Scalar = 1.0,
) -> Schedule:
    """Linear warmup to a peak, followed by cosine decay.

    Args:
        init_value: The value at step 0.
        peak_value: The value at ``warmup_steps``.
        warmup_steps: The length of the warmup.
        decay_steps: The total length, including the warmup.
        end_value: The value from ``decay_steps`` on.
        exponent: The exponent of the cosine.

    Example:
        >>> schedule = warmup_cosine_decay(0.0, 1.0, warmup_steps=10, decay_steps=100, end_value=0.1)
        >>> [round(float(schedule(step)), 3) for step in (5, 10, 55, 100)]
        [0.5, 1.0, 0.55, 0.1]
    """
    check_int("warmup_steps", warmup_steps, minimum=0)
    check_int("decay_steps", decay_steps, minimum=0)
    if decay_steps <= warmup_steps:
        raise ValueError(
            f"expected decay_steps to be larger than warmup_steps={warmup_steps}, got {decay_steps}. It includes the "
            "warmup."
        )
    alpha = end_value / peak_value if peak_value else 0.0
    decay = cosine(peak_value, decay_steps - warmup_steps, alpha=alpha, exponent=exponent)
    return warmup(decay, warmup_steps, init_value=init_value)
