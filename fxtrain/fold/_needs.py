"""Declares the requirements of a callback, so that a missing one is found before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fxtrain.core import TRACED, Callback, Event, describe
from fxtrain.fold._handler import Handler, Needs, handler_of


def needs(
    callback: Callback,
    *,
    eval_metrics: Sequence[str] = (),
    slots: Sequence[str] = (),
    events: Sequence[type[Event]] = (),
) -> Handler:
    """Declares requirements of ``callback``. ``fit`` raises before the first step if one is not met.

    Args:
        callback: ``(state, event) -> (state, control)``.
        eval_metrics: Names of evaluation metrics. They are checked by running the evaluation step on fake tensors or,
            if that is not possible, at the first evaluation.
        slots: Slots that are kept by other callbacks.
        events: Traced events that the step must fire, in addition to those that the callback subscribes to.

    Raises:
        TypeError: If an event is not traced.

    Example:
        >>> import torch, fxtrain as fx
        >>> def keep_improving(state, event: fx.EvalEnd):
        ...     return state, fx.Control(stop=event.metrics["accuracy"] < 0.5, reason="no better than chance")
        >>> callback = fx.needs(keep_improving, eval_metrics=["accuracy"])
        >>> step = fx.train_step(lambda model, batch: model(batch).sum(), fx.optim.sgd(0.1))
        >>> state, data = fx.init(torch.nn.Linear(1, 1), fx.optim.sgd(0.1)), [torch.ones(2, 1)]
        >>> eval_step = fx.eval_step(lambda model, batch: model(batch).sum())
        >>> fx.fit(state, step, data, steps=1, callbacks=callback, eval_step=eval_step, eval_data=data)
        Traceback (most recent call last):
        ...
        ValueError: expected the metric 'accuracy' at EvalEnd for keep_improving, got 'loss'. Return it from ...
    """
    for event in events:
        if event not in TRACED:
            names = ", ".join(kind.__name__ for kind in TRACED)
            raise TypeError(f"expected events to be traced event types ({names}), got {describe(event)}.")
    handler = handler_of(callback)
    old = handler.needs
    return dataclasses.replace(
        handler,
        needs=Needs(
            eval_metrics=(*old.eval_metrics, *eval_metrics),
            slots=(*old.slots, *slots),
            events=(*old.events, *events),
        ),
    )
