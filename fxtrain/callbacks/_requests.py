"""Callbacks that request a save or an evaluation, to be gated by a trigger."""

from __future__ import annotations

from fxtrain.core import Control, StepEnd, TrainState
from fxtrain.fold import Handler


def save() -> Handler:
    """Requests a checkpoint at each ``StepEnd``. Gate it: ``fx.when(fx.every(1000), fx.callbacks.save())``.

    The checkpoint holds the state after the fold, and after an evaluation that is due at the same step.

    Example:
        >>> import fxtrain as fx
        >>> fx.on(fx.EvalEnd, save())
        <callback save on EvalEnd>
    """

    def ask(state: TrainState, event: StepEnd) -> tuple[TrainState, Control]:
        return state, Control(save=True, reason="a save is due")

    return Handler("save", ask, frozenset({StepEnd}))


def evaluate() -> Handler:
    """Requests an evaluation at each ``StepEnd``. Gate it: ``fx.when(fx.every(500), fx.callbacks.evaluate())``.

    Example:
        >>> import fxtrain as fx
        >>> fx.when(fx.every(epochs=0.5), evaluate())
        <callback evaluate when every(epochs=0.5) on StepEnd>
    """

    def ask(state: TrainState, event: StepEnd) -> tuple[TrainState, Control]:
        return state, Control(evaluate=True, reason="an evaluation is due")

    return Handler("evaluate", ask, frozenset({StepEnd}))
