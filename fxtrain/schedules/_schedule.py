"""What a schedule is, and schedules of one piece: constants and decays."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import ParamSpec, cast

import torch
from torch import Tensor

from fxtrain.core import (
    Call,
    Scalar,
    check_int,
    check_positive,
    check_positive_int,
    describe,
    name_of,
    records_call,
    takes,
    wide_dtype,
)
from fxtrain.equivalents import refuse_foreign, with_known_arguments

P = ParamSpec("P")

Schedule = Callable[[Tensor], Tensor]
"""Maps the step (int64 []) to a value (float64 []). Those of this package take Python ints too."""


class DescribedSchedule:
    """A schedule with the call that made it, which is its ``repr``.

    Args:
        function: The schedule.
        call: The call.

    Example:
        >>> warm = cosine(1e-3, 1000, alpha=0.1)
        >>> warm, float(warm(0))
        (cosine(0.001, 1000, alpha=0.1), 0.001)
    """

    def __init__(self, function: Schedule, call: Call) -> None:
        self.function, self.call = function, call

    def __call__(self, step: int | Tensor) -> Tensor:
        return self.function(cast(Tensor, step))

    def __repr__(self) -> str:
        return repr(self.call)


def _described(schedule: Schedule, call: Call) -> Schedule:
    # A schedule that another function of this package made is described by the outer call only.
    return DescribedSchedule(schedule.function if isinstance(schedule, DescribedSchedule) else schedule, call)


def described(function: Callable[P, Schedule]) -> Callable[P, Schedule]:
    """Decorates a function that makes schedules, so that they show the call that made them."""
    return records_call(_described)(with_known_arguments(function))


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
    refuse_unusable_function(argument, schedule)


def refuse_unusable_function(argument: str, schedule: Callable[..., object]) -> None:
    """Raises if a schedule is a factory of this package that was not called, or does not take a step.

    Args:
        argument: The argument's name, for errors.
        schedule: The function.

    Raises:
        TypeError: The message names the function.
    """
    if torch.compiler.is_dynamo_compiling():  # which cannot trace signatures
        return
    is_ours = (getattr(schedule, "__module__", None) or "").startswith("fxtrain.schedules.")
    if is_ours and "." not in getattr(schedule, "__qualname__", "."):
        raise TypeError(
            f"expected {argument} to be a schedule, got the function {name_of(schedule)} of fxtrain.schedules. Call "
            f"it, as in fx.schedules.{name_of(schedule)}(...)."
        )
    if not takes(schedule, 1):
        raise TypeError(
            f"expected {argument} to be a function of the step, got {name_of(schedule)}{inspect.signature(schedule)}. "
            "Give it one parameter, the step."
        )


def wide(step: Tensor) -> Tensor:
    """Returns the step in float64, or in float32 on a device without float64."""
    # float32 cannot represent all steps past 2^24, and the error of powers of a factor near 1 grows with the step.
    return step.to(wide_dtype(step.device))


def as_value(value: Scalar, step: Tensor) -> Tensor:
    """Returns a value in the dtype of schedules, on the device of the step."""
    return torch.as_tensor(value, dtype=wide_dtype(step.device), device=step.device)


@described
def constant(value: Scalar) -> Schedule:
    """A constant schedule.

    Example:
        >>> constant(0.1)(7)
        tensor(0.1000, dtype=torch.float64)
    """
    return schedule_of(lambda step: value)


@described
def polynomial(
    init_value: Scalar, end_value: Scalar, *, power: Scalar = 1.0, transition_steps: int, transition_begin: int = 0
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

    def value(step: Tensor) -> Scalar:
        left = 1.0 - wide((step - transition_begin).clamp(0, transition_steps)) / transition_steps
        return (init_value - end_value) * left**power + end_value

    return schedule_of(value)


@described
def linear(init_value: Scalar, end_value: Scalar, *, transition_steps: int, transition_begin: int = 0) -> Schedule:
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


@described
def cosine(init_value: Scalar, decay_steps: int, *, alpha: Scalar = 0.0, exponent: Scalar = 1.0) -> Schedule:
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

    def value(step: Tensor) -> Scalar:
        angle = wide(step.clamp(0, decay_steps)) * (math.pi / decay_steps)
        return init_value * ((1 - alpha) * (0.5 * (1 + torch.cos(angle))) ** exponent + alpha)

    return schedule_of(value)


@described
def exponential(
    init_value: Scalar,
    transition_steps: int,
    *,
    decay_rate: Scalar,
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
    check_positive(decay_rate=decay_rate)
    if end_value is not None and isinstance(decay_rate, Tensor):
        raise ValueError(
            f"expected decay_rate to be a Python scalar, because end_value is given, got {describe(decay_rate)}. Its "
            "value decides whether end_value is a lower or an upper bound."
        )

    def value(step: Tensor) -> Scalar:
        elapsed = wide((step - transition_begin).clamp(min=0)) / transition_steps
        decayed = init_value * decay_rate ** (elapsed.floor() if staircase else elapsed)
        if end_value is None:
            return decayed
        return decayed.clamp(min=end_value) if decay_rate < 1 else decayed.clamp(max=end_value)

    return schedule_of(value)


@described
def inverse_sqrt(init_value: Scalar, timescale: int) -> Schedule:
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
    return schedule_of(lambda step: init_value * torch.rsqrt(1.0 + wide(step.clamp(min=0)) / timescale))
