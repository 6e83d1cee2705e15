"""Functions from the step to a value, such as a learning rate. They are tensor operations, so steps do not recompile.

A schedule takes the step, an int64 tensor of shape [] or a Python int, and returns a float64 tensor of shape [], or
float32 on devices without float64. Multiplied by a float32 tensor of more dimensions, it gives float32. Any function
with this signature is a schedule. Parameters of type ``Value`` may be 0-d tensors, so that a schedule can be
vectorized over them with ``vmap``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fxtrain.core import check_choice, check_int, check_positive_int, describe, wide_dtype
from fxtrain.equivalents import refuse_foreign

Schedule = Callable[[Any], Tensor]
"""Maps the step (int64 [], or an int) to a value (float64 [])."""

Value = float | Tensor
"""A Python scalar, or a tensor of shape []."""

Interpolation = Literal["constant", "linear", "cosine"]


def constant(value: Value) -> Schedule:
    """A constant schedule.

    Example:
        >>> constant(0.1)(7)
        tensor(0.1000, dtype=torch.float64)
    """
    return _schedule(lambda step: value)


def polynomial(
    init_value: Value, end_value: Value, *, power: Value = 1.0, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    """A polynomial transition from ``init_value`` to ``end_value``.

        value = (init - end) (1 - t / T)^power + end,    t = step - begin, clamped to [0, T]

    Args:
        init_value: The value until ``transition_begin``.
        end_value: The value from ``transition_begin + transition_steps`` on.
        power: The power of the polynomial; 1 is linear.
        transition_steps: T, the length of the transition; positive.
        transition_begin: Number of steps before the transition.

    Example:
        >>> polynomial(1.0, 0.0, power=2.0, transition_steps=10)(5)
        tensor(0.2500, dtype=torch.float64)
    """
    check_positive_int("transition_steps", transition_steps)
    check_int("transition_begin", transition_begin, minimum=0)

    def value(step: Tensor) -> Any:
        left = 1.0 - _wide((step - transition_begin).clamp(0, transition_steps)) / transition_steps
        return (init_value - end_value) * left**power + end_value

    return _schedule(value)


def linear(init_value: Value, end_value: Value, *, transition_steps: int, transition_begin: int = 0) -> Schedule:
    """A linear transition from ``init_value`` to ``end_value``.

    Args:
        init_value: The value until ``transition_begin``.
        end_value: The value from ``transition_begin + transition_steps`` on.
        transition_steps: The length of the transition; positive.
        transition_begin: Number of steps before the transition.

    Example:
        >>> linear(0.0, 1.0, transition_steps=10)(torch.tensor(3))
        tensor(0.3000, dtype=torch.float64)
    """
    return polynomial(init_value, end_value, transition_steps=transition_steps, transition_begin=transition_begin)


def cosine(init_value: Value, decay_steps: int, *, alpha: Value = 0.0, exponent: Value = 1.0) -> Schedule:
    """Cosine decay from ``init_value`` to ``alpha * init_value``.

        value = init ((1 - alpha) (1/2 (1 + cos(pi t / T)))^exponent + alpha),    t = min(step, T)

    Args:
        init_value: The value at step 0.
        decay_steps: T, the length of the decay; positive.
        alpha: The final value as a fraction of ``init_value``.
        exponent: The exponent of the cosine.

    Example:
        >>> [round(float(cosine(1.0, 4)(step)), 3) for step in range(6)]
        [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]

    References:
        Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017.
    """
    check_positive_int("decay_steps", decay_steps)

    def value(step: Tensor) -> Any:
        angle = _wide(step.clamp(0, decay_steps)) * (math.pi / decay_steps)
        return init_value * ((1 - alpha) * (0.5 * (1 + torch.cos(angle))) ** exponent + alpha)

    return _schedule(value)


def exponential(
    init_value: Value,
    transition_steps: int,
    *,
    decay_rate: Value,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: float | None = None,
) -> Schedule:
    """Exponential decay, or growth if ``decay_rate`` is above 1.

        value = init * decay_rate^((step - begin) / T)

    Args:
        init_value: The value until ``transition_begin``.
        transition_steps: T, the steps in which the value is multiplied by ``decay_rate`` once; positive.
        decay_rate: The factor; positive.
        transition_begin: Number of steps before the decay.
        staircase: Whether the exponent is rounded down, so that the value changes at multiples of T only.
        end_value: A lower bound of the value, or an upper bound if ``decay_rate`` is 1 or more; None for no bound.

    Example:
        >>> exponential(1.0, 10, decay_rate=0.5)(20)
        tensor(0.2500, dtype=torch.float64)
    """
    check_positive_int("transition_steps", transition_steps)
    check_int("transition_begin", transition_begin, minimum=0)
    if not isinstance(decay_rate, Tensor) and not decay_rate > 0:
        raise ValueError(f"expected decay_rate to be positive, got {decay_rate!r}.")
    if end_value is not None and isinstance(decay_rate, Tensor):
        raise ValueError(
            f"expected decay_rate to be a Python scalar, because end_value is given, got {describe(decay_rate)}. Its "
            "value decides whether end_value is a lower or an upper bound."
        )

    def value(step: Tensor) -> Any:
        elapsed = _wide((step - transition_begin).clamp(min=0)) / transition_steps
        decayed = init_value * decay_rate ** (elapsed.floor() if staircase else elapsed)
        if end_value is None:
            return decayed
        return decayed.clamp(min=end_value) if decay_rate < 1 else decayed.clamp(max=end_value)

    return _schedule(value)


def inverse_sqrt(init_value: Value, timescale: int) -> Schedule:
    """Inverse square root decay.

        value = init / sqrt(1 + step / timescale)

    ``warmup(inverse_sqrt(init, timescale), timescale)`` is the schedule of the original Transformer: after the warmup
    its value is ``init * sqrt(timescale / step)``.

    Args:
        init_value: The value at step 0.
        timescale: The unit of the decay in steps; positive.

    Example:
        >>> inverse_sqrt(1.0, 100)(300)
        tensor(0.5000, dtype=torch.float64)

    References:
        Vaswani et al., Attention Is All You Need, 2017.
    """
    check_positive_int("timescale", timescale)
    return _schedule(lambda step: init_value * torch.rsqrt(1.0 + _wide(step.clamp(min=0)) / timescale))


def piecewise(
    init_value: Value,
    boundaries_and_scales: Mapping[float, Value],
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

    def between(index: int, step: Tensor) -> Any:
        start, end = values[index], values[index + 1]
        if interpolation == "constant":
            return start
        width = (boundaries[index + 1] - boundaries[index]) or 1
        part = _past(step, boundaries[index]) / width
        return start + (end - start) * (part if interpolation == "linear" else 0.5 * (1 - torch.cos(math.pi * part)))

    def value(step: Tensor) -> Any:
        found = _float(values[-1], step)
        for index in reversed(range(len(values) - 1)):
            before = _past(step, boundaries[index + 1]) < 0
            found = torch.where(before, _float(between(index, step), step), found)
        return found

    return _schedule(value)


def one_cycle(
    transition_steps: int,
    peak_value: Value,
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
    if div_factor <= 0 or final_div_factor <= 0:
        raise ValueError(
            "expected div_factor and final_div_factor to be positive, got "
            f"div_factor={div_factor!r}, final_div_factor={final_div_factor!r}."
        )
    scales: dict[float, Value] = {int(pct_start * transition_steps): div_factor}
    if interpolation == "linear":
        scales[int(pct_final * transition_steps)] = 1 / div_factor
        scales[transition_steps] = 1 / final_div_factor
    else:
        scales[transition_steps] = 1 / (div_factor * final_div_factor)
    return piecewise(peak_value / div_factor, scales, interpolation=interpolation)


def warmup(schedule: Schedule, steps: int, *, init_value: Value = 0.0) -> Schedule:
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
    _refuse_unless_schedule("schedule", schedule)
    check_int("steps", steps, minimum=0)
    if steps == 0:
        return schedule

    def value(step: Tensor) -> Any:
        peak = schedule(torch.zeros_like(step))
        rising = init_value + (peak - init_value) * (_wide(step) / steps)
        return torch.where(step < steps, rising, schedule((step - steps).clamp(min=0)))

    return _schedule(value)


def warmup_cosine_decay(
    init_value: Value,
    peak_value: float,
    *,
    warmup_steps: int,
    decay_steps: int,
    end_value: float = 0.0,
    exponent: Value = 1.0,
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


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Joins schedules one after another, each from its own step 0.

    Args:
        schedules: The schedules, one more than boundaries.
        boundaries: The steps at which the next schedule begins, increasing.

    Example:
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
        _refuse_unless_schedule(f"schedules[{index}]", schedule)
    for index, boundary in enumerate(boundaries):
        check_int(f"boundaries[{index}]", boundary, minimum=0)
    if list(boundaries) != sorted(set(boundaries)):
        raise ValueError(f"expected boundaries to be increasing, got {list(boundaries)}.")

    def value(step: Tensor) -> Any:
        found = _float(schedules[0](step), step)
        for boundary, schedule in zip(boundaries, schedules[1:], strict=True):
            found = torch.where(step < boundary, found, _float(schedule((step - boundary).clamp(min=0)), step))
        return found

    return _schedule(value)


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
        >>> [float(cycle(linear(0.0, 1.0, transition_steps=2), 2)(step)) for step in range(5)]
        [0.0, 0.5, 0.0, 0.5, 0.0]
        >>> [float(cycle(linear(0.0, 1.0, transition_steps=2), 2, mirror=True)(step)) for step in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.0]

    References:
        Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017.
    """
    _refuse_unless_schedule("schedule", schedule)
    check_positive_int("period", period)
    check_positive_int("growth", growth)
    if mirror and growth != 1:
        raise ValueError(f"expected growth=1 with mirror=True, got {growth}. Leave one of them out.")

    def grown(step: Tensor) -> Any:
        # Cycle k begins at period (growth^k - 1) / (growth - 1). The logarithm may miss by one at a boundary.
        wide = _wide(step)
        cycles = torch.log1p(wide * (growth - 1) / period).div(math.log(growth)).round()
        start = period * (growth**cycles - 1) / (growth - 1)
        cycles = torch.where(wide < start, cycles - 1, cycles)
        start = period * (growth**cycles - 1) / (growth - 1)
        return schedule((wide - start) / growth**cycles)

    def value(step: Tensor) -> Any:
        if growth > 1:
            return grown(step)
        if mirror:
            return schedule(period - (step % (2 * period) - period).abs())
        return schedule(step % period)

    return _schedule(value)


def _refuse_unless_schedule(argument: str, schedule: Any) -> None:
    refuse_foreign(argument, "a schedule", schedule, as_schedule=True)
    if not callable(schedule):
        raise TypeError(
            f"expected {argument} to be a function of the step, got {describe(schedule)}. For a constant, use "
            "fx.schedules.constant."
        )


def _schedule(value: Callable[[Tensor], Any]) -> Schedule:
    def schedule(step: Any) -> Tensor:
        count = torch.as_tensor(step)
        return _float(value(count), count)

    return schedule


def _wide(step: Tensor) -> Tensor:
    # float32 cannot represent all steps past 2^24, and the error of powers of a factor near 1 grows with the step.
    return step.to(wide_dtype(step.device))


def _past(step: Tensor, boundary: float) -> Tensor:
    # An integer tensor minus a float would be float32.
    return _wide(step - boundary) if isinstance(boundary, int) else _wide(step) - boundary


def _float(value: Any, step: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=wide_dtype(step.device), device=step.device)
