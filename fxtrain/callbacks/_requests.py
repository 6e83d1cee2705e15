"""Callbacks that request a save or an evaluation, to be gated by a trigger."""

from __future__ import annotations

from fxtrain.core import Callback, Control, StepEnd, TrainState
from fxtrain.fold import Handler, When, as_trigger, when


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

    def ask(state: TrainState, event: StepEnd) -> tuple[TrainState, Control]:
        return state, Control(save=True, reason="a save is due")

    return _gated(every, Handler("save", ask, frozenset({StepEnd})))


def evaluate(every: When = 1) -> Callback:
    """Requests evaluations.

    Args:
        every: When to evaluate: a number of steps, or a trigger, evaluated at ``StepEnd``.

    Example:
        >>> import fxtrain as fx
        >>> evaluate(every=fx.every(epochs=0.5))
        <callback evaluate when every(epochs=0.5) on StepEnd>
    """

    def ask(state: TrainState, event: StepEnd) -> tuple[TrainState, Control]:
        return state, Control(evaluate=True, reason="an evaluation is due")

    return _gated(every, Handler("evaluate", ask, frozenset({StepEnd})))


def _gated(every: When, handler: Handler) -> Callback:
    trigger = as_trigger(every)
    return handler if every == 1 else when(trigger, handler)
