"""Pure predicates of events, and ``when``, which gates a callback by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import (
    TRACED,
    Callback,
    Control,
    Event,
    Flag,
    TrainState,
    check_int,
    check_positive_int,
    describe,
    name_of,
    takes,
)
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.fold._checks import refuse_other_structure
from fxtrain.fold._compose import Composed
from fxtrain.fold._handler import Handler, checked_result, handler_of

Predicate = Callable[[Any], Flag]
"""Maps an event to a bool, or to a bool tensor of shape [] inside the step."""


@dataclasses.dataclass(frozen=True, repr=False)
class Trigger:
    """A pure predicate of an event, made by ``every``, ``at`` or ``after``. Combine with ``&``, ``|`` and ``~``.

    Args:
        text: The repr of the trigger.
        predicate: Maps an event to a bool, or to a bool tensor of shape [] inside the step.

    Example:
        >>> import fxtrain as fx
        >>> trigger = every(2) & ~at(4)
        >>> trigger, [step for step in range(1, 7) if trigger(fx.StepEnd(step=step, metrics={}))]
        ((every(2) & ~at(4)), [2, 6])
    """

    text: str
    predicate: Predicate

    def __call__(self, event: Event, /) -> Flag:
        return self.predicate(event)

    def __and__(self, other: Predicate) -> Trigger:
        _refuse_unless_trigger("&", other)
        return Trigger(f"({self} & {other})", lambda event: self(event) & other(event))

    def __or__(self, other: Predicate) -> Trigger:
        _refuse_unless_trigger("|", other)
        return Trigger(f"({self} | {other})", lambda event: self(event) | other(event))

    def __invert__(self) -> Trigger:
        def negated(event: Event) -> Flag:
            flag = self(event)
            return ~flag if isinstance(flag, Tensor) else not flag

        return Trigger(f"~{self}", negated)

    def __bool__(self) -> bool:
        raise TypeError(f"expected {self} to be called with an event, got bool(). Combine triggers with &, | and ~.")

    def __repr__(self) -> str:
        return self.text


def _refuse_unless_trigger(operator: str, other: object) -> None:
    if not callable(other):
        raise TypeError(f"expected a trigger after {operator}, got {describe(other)}. Make one: fxtrain.every(100).")


When = int | Predicate
"""When something happens: at steps that are multiples of an int, or whenever a trigger holds."""


@with_short_traceback
def every(steps: int | None = None, *, seconds: float | None = None, epochs: float | None = None) -> Trigger:
    """Holds at each multiple of a period. Give exactly one of ``steps``, ``seconds`` and ``epochs``.

    A period in seconds or epochs usually ends between two events; the trigger then holds at the later one.

    Args:
        steps: The period in steps.
        seconds: The period in seconds since the session began.
        epochs: The period in epochs, which may be a fraction.

    Raises:
        ValueError: If not exactly one period is given, or if it is not positive.
        TypeError: If ``steps`` is not an int. When it runs, if the event has no clock (``seconds``) or the epoch length
            is unknown (``epochs``).

    Example:
        >>> import fxtrain as fx
        >>> [step for step in range(1, 8) if every(3)(fx.StepEnd(step=step, metrics={}))]
        [3, 6]
    """
    unit, period = _one_of("every", steps=steps, seconds=seconds, epochs=epochs)
    if unit == "steps":
        check_positive_int("steps", period)
        return Trigger(f"every({period})", lambda event: event.step % period == 0)
    if period <= 0:
        raise ValueError(f"every: expected {unit} to be positive, got {period!r}.")
    if unit == "seconds":
        return Trigger(
            f"every(seconds={period})", lambda event: _elapsed(event) // period > event.previous_time // period
        )

    def crossed_epochs(event: Event) -> Flag:
        now, length = _epoch(event)
        nudge = 1e-6 / length  # keeps 3 * 0.1 epochs from landing below 0.3
        return (now + nudge) // period > (now - 1 / length + nudge) // period and now > 0

    return Trigger(f"every(epochs={period})", crossed_epochs)


@with_short_traceback
def at(*steps: int) -> Trigger:
    """Holds at the given steps.

    Example:
        >>> import fxtrain as fx
        >>> [step for step in range(1, 8) if at(2, 5)(fx.StepEnd(step=step, metrics={}))]
        [2, 5]
    """
    if not steps:
        raise ValueError("at: expected at least one step, got none.")
    for step in steps:
        check_int("a step of at", step, minimum=0)

    def holds(event: Event) -> Flag:
        if isinstance(event.step, Tensor):
            return torch.isin(event.step, torch.tensor(steps, device=event.step.device))
        return event.step in steps

    return Trigger(f"at({', '.join(map(str, steps))})", holds)


@with_short_traceback
def after(steps: int | None = None, *, seconds: float | None = None, epochs: float | None = None) -> Trigger:
    """Holds past a threshold. Give exactly one of ``steps``, ``seconds`` and ``epochs``.

    The trigger does not hold at the threshold itself.

    Args:
        steps: The threshold in steps.
        seconds: The threshold in seconds since the session began.
        epochs: The threshold in epochs, which may be a fraction.

    Raises:
        ValueError: If not exactly one threshold is given.
        TypeError: If ``steps`` is not an int. When it runs, if the event has no clock (``seconds``) or the epoch length
            is unknown (``epochs``).

    Example:
        >>> import fxtrain as fx
        >>> [step for step in range(1, 6) if after(3)(fx.StepEnd(step=step, metrics={}))]
        [4, 5]
    """
    unit, period = _one_of("after", steps=steps, seconds=seconds, epochs=epochs)
    if unit == "steps":
        check_int("steps", period, minimum=0)
        return Trigger(f"after({period})", lambda event: event.step > period)
    if unit == "seconds":
        return Trigger(f"after(seconds={period})", lambda event: _elapsed(event) > period)
    return Trigger(f"after(epochs={period})", lambda event: _epoch(event)[0] > period)


def of_model(*names: str) -> Trigger:
    """Holds at the traced events of the given models, in a step that trains several, and at all other events.

    Args:
        names: Keys of the dict of modules given to ``init``.

    Example:
        >>> import fxtrain as fx
        >>> fx.when(of_model("generator"), fx.callbacks.nan_guard())
        <callback nan_guard when of_model('generator') on Gradients, StepEnd, slot 'nan_guard'>
    """
    if not names:
        raise ValueError("of_model: expected the name of at least one model, got none.")
    for name in names:
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"of_model: expected the names of models, got {describe(name)}.")
    return Trigger(
        f"of_model({', '.join(map(repr, names))})",
        lambda event: not isinstance(event, TRACED) or event.model in names,
    )


def as_trigger(when: When, argument: str = "every") -> Predicate:
    """Returns a trigger for an argument such as ``every=``: the trigger itself, or ``every(n)`` for an int n.

    Args:
        when: A positive int or a trigger.
        argument: The argument's name, for errors.

    Raises:
        TypeError: If ``when`` is neither an int nor callable.
        ValueError: If ``when`` is smaller than 1.

    Example:
        >>> as_trigger(100), as_trigger(after(5))
        (every(100), after(5))
    """
    if callable(when):
        if not takes(when, 1):
            raise TypeError(
                f"expected {argument} to be a function of the event, got {name_of(when)}, which does not take one "
                "argument. Define it as lambda event: ..., and give it before the callback."
            )
        return when
    is_int = isinstance(when, int) and not isinstance(when, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
    if is_int and when >= 1:
        return every(when)
    raise (ValueError if is_int else TypeError)(
        f"expected {argument} to be a positive int or a trigger, got {describe(when)}. Make a trigger: "
        "fxtrain.every(100), or fxtrain.every(epochs=1)."
    )


@with_short_traceback
def when(trigger: When, callback: Callback) -> Handler | Composed:
    """Gates ``callback`` by ``trigger``. The callback keeps its subscription and its slot.

    Inside the compiled step a trigger is a tensor. The callback is then computed at every step, and its writes and
    requests count only if the trigger holds.

    Args:
        trigger: Maps an event to a bool, or to a bool tensor of shape []. An int n stands for ``every(n)``.
        callback: ``(state, event) -> (state, control)``, or a composed callback, each part of which is gated.

    Example:
        >>> import fxtrain as fx
        >>> when(every(1000), fx.callbacks.save())
        <callback save when every(1000) on StepEnd>
    """
    holds = as_trigger(trigger, "trigger")
    if isinstance(callback, Composed):
        return Composed(tuple(_gate(holds, handler) for handler in callback.handlers))
    return _gate(holds, handler_of(callback))


def _gate(trigger: Predicate, handler: Handler) -> Handler:
    text = repr(trigger) if isinstance(trigger, Trigger) else name_of(trigger)

    def gate(handler: Handler) -> Callback:
        def gated(state: TrainState, event: Event) -> tuple[TrainState, Control]:
            flag = trigger(event)
            if not isinstance(flag, Tensor):
                return handler.function(state, event) if flag else (state, Control())
            new, control = checked_result(handler, event, handler.function(state, event))
            refuse_other_structure(handler.name, type(event), state, new)
            return new.replace(slots=tree.where(flag, new.slots, state.slots)), control.gated(flag)

        return gated

    return handler.wrapped(gate, name=f"{handler.name} when {text}")


def _one_of(function: str, **periods: float | None) -> tuple[str, float]:
    given = {unit: period for unit, period in periods.items() if period is not None}
    if len(given) != 1:
        got = ", ".join(f"{unit}={period!r}" for unit, period in given.items()) or "none"
        raise ValueError(f"{function}: expected exactly one of steps, seconds and epochs, got {got}.")
    return next(iter(given.items()))


def _elapsed(event: Event) -> float:
    if isinstance(event, TRACED):
        raise TypeError(
            f"expected an event with a clock, got {type(event).__name__}, which fires inside the step. Count steps, or "
            "subscribe to a loop event such as StepEnd."
        )
    return event.time


def _epoch(event: Event) -> tuple[float, int]:
    """Returns the fractional epoch and the length of an epoch."""
    if isinstance(event, TRACED) or event.epoch is None or event.epoch_length is None:
        raise TypeError(
            f"expected an event with a known epoch length, got {type(event).__name__} without one. Count steps, or "
            "use data that has a length."
        )
    return event.epoch, event.epoch_length
