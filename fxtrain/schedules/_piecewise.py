"""Schedules through given points: constant or interpolated between boundaries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fxtrain.core import Scalar, check_choice, check_positive, check_positive_int, describe
from fxtrain.schedules._schedule import Schedule, as_value, past, schedule_of

Interpolation = Literal["constant", "linear", "cosine"]


def piecewise(
    init_value: Scalar,
    boundaries_and_scales: Mapping[float, Scalar],
    *,
    interpolation: Interpolation = "constant",
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
        part = past(step, boundaries[index]) / width
        return start + (end - start) * (part if interpolation == "linear" else 0.5 * (1 - torch.cos(math.pi * part)))

    def value(step: Tensor) -> Scalar:
        found = as_value(values[-1], step)
        for index in reversed(range(len(values) - 1)):
            before = past(step, boundaries[index + 1]) < 0
            found = torch.where(before, as_value(between(index, step), step), found)
        return found

    return schedule_of(value)


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
