"""Schedules of several pieces: warmups, sequences, cycles, and curves through given points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fxtrain.core import Scalar, check_choice, check_int, check_positive, check_positive_int, describe
from fxtrain.schedules._schedule import Schedule, as_value, cosine, described, refuse_unless_schedule, schedule_of, wide


@described
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


@described
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


@described
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


@described
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

    if growth > 1:
        return schedule_of(grown)
    if mirror:
        return schedule_of(lambda step: schedule(period - (step % (2 * period) - period).abs()))
    return schedule_of(lambda step: schedule(step % period))


@described
def piecewise(
    init_value: Scalar,
    boundaries_and_scales: Mapping[float, Scalar],
    *,
    interpolation: Literal["constant", "linear", "cosine"] = "constant",
) -> Schedule:
    """Multiplies the value by a factor at each boundary.

    Args:
        init_value: The value at step 0.
        boundaries_and_scales: From steps to factors. The value at a boundary is the value at the previous boundary
            times the factor. A boundary may be a fractional step.
        interpolation: ``"constant"`` changes the value at the boundary; ``"linear"`` and ``"cosine"`` interpolate from
            the previous boundary.

    Example:
        >>> schedule = piecewise(1.0, {10: 0.1, 20: 0.5})
        >>> [round(float(schedule(step)), 3) for step in (9, 10, 20)]
        [1.0, 0.1, 0.05]
        >>> piecewise(1.0, {10: 0.0}, interpolation="linear")(5)
        tensor(0.5000, dtype=torch.float64)
    """
    check_choice("interpolation", interpolation, ("constant", "linear", "cosine"))
    if not isinstance(boundaries_and_scales, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected boundaries_and_scales to be a mapping from steps to factors, got "
            f"{describe(boundaries_and_scales)}. Pass a dict, as in piecewise(0.1, {{1000: 0.5}})."
        )
    boundaries = [0, *sorted(boundaries_and_scales)]
    values = [init_value]
    for boundary in boundaries[1:]:
        if isinstance(boundary, bool) or not isinstance(boundary, int | float) or not 0 <= boundary < math.inf:
            raise ValueError(f"expected boundaries to be non-negative numbers, got {describe(boundary)}.")
        values.append(values[-1] * boundaries_and_scales[boundary])

    def between(index: int, step: Tensor) -> Scalar:
        start, end = values[index], values[index + 1]
        if interpolation == "constant":
            return start
        width = (boundaries[index + 1] - boundaries[index]) or 1
        part = _past(step, boundaries[index]) / width
        return start + (end - start) * (part if interpolation == "linear" else 0.5 * (1 - torch.cos(math.pi * part)))

    def value(step: Tensor) -> Scalar:
        found = as_value(values[-1], step)
        for index in reversed(range(len(values) - 1)):
            before = _past(step, boundaries[index + 1]) < 0
            found = torch.where(before, as_value(between(index, step), step), found)
        return found

    return schedule_of(value)


@described
def one_cycle(
    transition_steps: int,
    peak_value: Scalar,
    *,
    pct_start: float = 0.3,
    pct_final: float = 0.85,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    interpolation: Literal["linear", "cosine"] = "cosine",
) -> Schedule:
    """The one-cycle policy: a rise to the peak, then a fall far below the initial value.

    The value goes from ``peak / div_factor`` to ``peak`` to ``peak / (div_factor * final_div_factor)``.

    Args:
        transition_steps: The length of the cycle; positive.
        peak_value: The highest value.
        pct_start: The fraction of steps at which the peak is reached.
        pct_final: With linear interpolation, the fraction of steps at which the value is back at its initial value,
            before it falls to the final value. Cosine interpolation falls from the peak to the final value directly.
        div_factor: The ratio of the peak to the initial value.
        final_div_factor: The ratio of the initial to the final value.
        interpolation: ``"cosine"`` or ``"linear"``.

    Example:
        >>> schedule = one_cycle(100, 1.0)
        >>> [round(float(schedule(step)), 6) for step in (0, 30, 100)]
        [0.04, 1.0, 4e-06]

    References:
        Smith and Topin, Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates, 2017.
    """
    check_positive_int("transition_steps", transition_steps)
    if not 0 < pct_start < pct_final < 1:
        raise ValueError(
            f"expected 0 < pct_start < pct_final < 1, got pct_start={pct_start!r}, pct_final={pct_final!r}."
        )
    check_positive(div_factor=div_factor, final_div_factor=final_div_factor)
    scales: dict[float, Scalar] = {int(pct_start * transition_steps): div_factor}
    if interpolation == "linear":
        scales[int(pct_final * transition_steps)] = 1 / div_factor
        scales[transition_steps] = 1 / final_div_factor
    else:
        scales[transition_steps] = 1 / (div_factor * final_div_factor)
    return piecewise(peak_value / div_factor, scales, interpolation=interpolation)


def _past(step: Tensor, boundary: float) -> Tensor:
    """Returns the number of steps since a boundary, negative before it."""
    # An integer tensor minus a float would be float32.
    return wide(step - boundary) if isinstance(boundary, int) else wide(step) - boundary
