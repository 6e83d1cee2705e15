"""Callbacks that request a stop at a limit, a save or an evaluation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.callbacks._watched_metric import (
    Best,
    Better,
    Metric,
    called,
    direction,
    improve,
    measured,
    needing,
    no_best,
    sign_of,
)
from fxtrain.core import Callback, Control, EvalEnd, StepEnd, TrainState, describe
from fxtrain.equivalents import with_known_arguments
from fxtrain.fold import Handler, When, as_trigger, stateful, when
from fxtrain.fold._settings import accepts_settings_per_member


@accepts_settings_per_member
def stop_at(metric: Metric, value: float, *, mode: str = "min", on: type[EvalEnd | StepEnd] = EvalEnd) -> Handler:
    """Stops the run when a metric reaches a value.

    Args:
        metric: Metric name, or a function of all metrics of the event.
        value: The value to reach.
        mode: ``"min"`` if lower is better, or ``"max"``.
        on: ``EvalEnd``, or ``StepEnd`` for a metric of the step.

    Raises:
        ValueError: If an argument is out of range.
        KeyError: At run time, if the event has no such metric.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(stop_at("accuracy", 0.9, mode="max"))
        >>> event = fx.EvalEnd(step=1, metrics={"accuracy": torch.tensor(0.95)})
        >>> callback(fx.init(torch.nn.Linear(1, 1)), event)[1].reasons("stop")
        ['accuracy reached 0.9']
    """
    sign, what = sign_of(mode), called(metric)
    _check_limit("value", value, on)

    def reached(state: TrainState, event: EvalEnd | StepEnd) -> tuple[TrainState, Control]:
        now = measured(event, metric, "stop_at", state.step.device)
        return state, Control(stop=sign * now <= sign * value, reason=f"{what} reached {value:g}")

    return _watching(Handler(f"stop_at {what}", reached, frozenset({on})), metric, on)


@accepts_settings_per_member
def stop_on_divergence(
    metric: Metric, limit: float | None = None, *, mode: str = "min", on: type[EvalEnd | StepEnd] = EvalEnd
) -> Handler:
    """Stops the run when a metric is not finite, or has reached a limit on its bad side.

    Gate it to start later, as in ``fx.when(fx.after(100), stop_on_divergence("loss", 10.0))``.

    Args:
        metric: Metric name, or a function of all metrics of the event.
        limit: The value that counts as diverged, as does any worse one. None checks only that values are finite.
        mode: ``"min"`` if lower is better, or ``"max"``.
        on: ``EvalEnd``, or ``StepEnd`` for a metric of the step.

    Raises:
        ValueError: If an argument is out of range.
        KeyError: At run time, if the event has no such metric.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(stop_on_divergence("loss", 10.0))
        >>> event = fx.EvalEnd(step=1, metrics={"loss": torch.tensor(12.0)})
        >>> callback(fx.init(torch.nn.Linear(1, 1)), event)[1].reasons("stop")
        ['loss diverged: it reached 10']
    """
    sign, what = sign_of(mode), called(metric)
    _check_limit("limit", 0.0 if limit is None else limit, on)

    def diverged(state: TrainState, event: EvalEnd | StepEnd) -> tuple[TrainState, Control]:
        now = measured(event, metric, "stop_on_divergence", state.step.device)
        stops = {f"{what} is not finite": ~now.isfinite()}
        if limit is not None:
            stops[f"{what} diverged: it reached {limit:g}"] = sign * now >= sign * limit
        return state, Control(stop=stops)

    return _watching(Handler(f"stop_on_divergence {what}", diverged, frozenset({on})), metric, on)


def _check_limit(argument: str, value: float, on: type[EvalEnd | StepEnd]) -> None:
    if not math.isfinite(value):
        raise ValueError(f"expected {argument} to be finite, got {describe(value)}.")
    if on not in (EvalEnd, StepEnd):
        raise ValueError(f"expected on to be EvalEnd or StepEnd, got {describe(on)}.")


def _watching(callback: Handler, metric: Metric, on: type[EvalEnd | StepEnd]) -> Handler:
    return needing(callback, metric) if on is EvalEnd else callback


class TimeLimitState(NamedTuple):
    """State of ``time_limit``."""

    seconds: Tensor  # float64 []: elapsed time of all sessions so far


@with_known_arguments
def time_limit(*, seconds: float = 0.0, minutes: float = 0.0, hours: float = 0.0, name: str = "time_limit") -> Handler:
    """Stops the run after a total time, earlier sessions included.

    The limit is checked after each step, so a run can exceed it by a step, an evaluation and a save. The limit is the
    sum of all three units.

    Args:
        seconds: Seconds.
        minutes: Minutes.
        hours: Hours.
        name: The slot.

    Raises:
        ValueError: If the sum is not positive and finite.

    Example:
        >>> import torch, fxtrain as fx
        >>> limit = fx.compose(time_limit(minutes=1))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), limit)
        >>> for step, time in enumerate([0.0, 30.0, 61.0], start=1):
        ...     event = fx.StepEnd(step=step, metrics={}, time=time, previous_time=max(0.0, time - 31))
        ...     state, control = limit(state, event)
        >>> control.reasons("stop")
        ['reached the time limit of 60 s']
    """
    limit = seconds + 60 * minutes + 3600 * hours
    if not (0 < limit < math.inf):
        raise ValueError(f"expected the time limit to be positive and finite, got {limit:g} s.")

    def update(state: TrainState, event: StepEnd, slot: TimeLimitState) -> tuple[TimeLimitState, Control]:
        slot = TimeLimitState(slot.seconds + (event.time - event.previous_time))
        return slot, Control(stop=slot.seconds >= limit, reason=f"reached the time limit of {limit:g} s")

    def init(state: TrainState) -> TimeLimitState:
        return TimeLimitState(torch.zeros((), dtype=torch.float64, device=state.step.device))

    return stateful(name, init, update)


@with_known_arguments
def save(every: When = 1) -> Callback:
    """Requests checkpoints.

    A checkpoint holds the state after the fold, and after an evaluation that is due at the same step.

    Args:
        every: When to save: a number of steps, or a trigger, evaluated at ``StepEnd``.

    Example:
        >>> import fxtrain as fx
        >>> save(every=1000), fx.on(fx.EvalEnd, save())
        (<callback save when every(1000) on StepEnd>, <callback save on EvalEnd>)
    """
    return _requesting("save", Control(save=True, reason="a save is due"), every)


@with_known_arguments
@accepts_settings_per_member
def save_best(
    metric: Metric,
    *,
    mode: str | Better = "min",
    min_delta: float = 0.0,
    relative: bool = False,
    name: str = "save_best",
) -> Handler:
    """Requests a checkpoint at each evaluation that improves a metric.

    ``fxtrain.checkpointer(folder, best=metric)`` keeps the best checkpoint when newer ones displace it, and its
    ``best()`` returns the step. ``observers.export(folder)`` writes the best weights for other programs.

    Args:
        metric: Metric name at ``EvalEnd``, or a function of all metrics there.
        mode: ``"min"`` if lower is better, or ``"max"``. Or a function ``(value, best) -> improved`` of tensors of
            shape []. Its ``best`` is nan before the first evaluation.
        min_delta: Margin of an improvement, in the metric's units, 0 or more.
        relative: Whether ``min_delta`` is a fraction of the best value instead.
        name: The slot.

    Raises:
        ValueError: If an argument is out of range.
        KeyError: At run time, if the evaluation has no such metric.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(save_best("loss"))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        >>> for step, loss in enumerate([3.0, 2.0, 2.5]):
        ...     event = fx.EvalEnd(step=step, metrics={"loss": torch.tensor(loss)})
        ...     state, control = callback(state, event)
        ...     print(control.reasons("save"))
        ['loss improved']
        ['loss improved']
        []
    """
    better, worst = direction(mode, min_delta=min_delta, relative=relative)
    reason = f"{called(metric)} improved"

    def update(state: TrainState, event: EvalEnd, slot: Best) -> tuple[Best, Control]:
        slot, improved = improve(slot, measured(event, metric, name, slot.best.device), state.step, better)
        return slot, Control(save=improved, reason=reason)

    return needing(stateful(name, lambda state: no_best(state, worst), update), metric)


def evaluate(every: When = 1) -> Callback:
    """Requests evaluations.

    Args:
        every: When to evaluate: a number of steps, or a trigger, evaluated at ``StepEnd``.

    Example:
        >>> import fxtrain as fx
        >>> evaluate(every=fx.every(epochs=0.5))
        <callback evaluate when every(epochs=0.5) on StepEnd>
    """
    return _requesting("evaluate", Control(evaluate=True, reason="an evaluation is due"), every)


def _requesting(name: str, control: Control, every: When) -> Callback:
    trigger = as_trigger(every)
    handler = Handler(name, lambda state, event: (state, control), frozenset({StepEnd}))
    return handler if every == 1 else when(trigger, handler)
