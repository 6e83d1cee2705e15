"""Callbacks of a batch of runs that differ between members, or see all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from fxtrain.core import TRACED, Callback, describe, name_of
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.fold import Composed, Handler
from fxtrain.fold._handler import handler_of
from fxtrain.fold._per_member import Across, per_member_settings


@with_short_traceback
def each(factory: Callable[..., Callback], **settings: Tensor | object) -> Handler:
    """Makes a callback whose settings differ between the members of a batch of runs.

    ``fxtrain.callbacks.early_stopping`` and others with a ``patience`` accept such tensors directly.

    Args:
        factory: A function of ``fxtrain.callbacks``, or any function of these settings that makes a callback.
        settings: The arguments. A tensor [members], or a list or tuple with an entry for each member, has a value for
            each. Tensors of shape [] and other values are shared.

    Raises:
        TypeError: If the factory makes several callbacks.
        ValueError: If no setting has a value for each member, their numbers differ, or the callback runs inside the
            compiled step, which has one graph for all members.

    Example:
        >>> import torch, fxtrain as fx
        >>> fx.ensemble.each(fx.callbacks.stop_at, metric="loss", value=torch.tensor([0.1, 0.2]))
        <callback stop_at loss on EvalEnd>
    """
    return per_member_settings(factory, (), settings)


@with_short_traceback
def across(callback: Callback) -> Handler:
    """Makes a callback that sees all members of a batch of runs, as population-based training does.

    It is called with the stacked state, whose leaves have shape [members, ...], and an event whose metrics have shape
    [members]. It returns a stacked state, and requests that hold for all members. Members that have stopped keep their
    state.

    Args:
        callback: ``(state, event) -> (state, control)``. Its annotation or ``fxtrain.on`` selects the events.

    Raises:
        TypeError: If several callbacks are given.
        ValueError: If it subscribes to an event inside the compiled step, or has a slot, which is that of one member.

    Example:
        >>> import torch, fxtrain as fx
        >>> def copy_best(state, event: fx.StepEnd):
        ...     best = event.metrics["loss"].argmin().expand(2)
        ...     return state.replace(params=fx.tree.map(lambda leaf: leaf[best], state.params)), fx.Control()
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: (model["w"] - batch).square(), tx)
        >>> runs = fx.ensemble.stack([fx.init({"w": torch.tensor(w)}, tx) for w in (0.0, 1.0)])
        >>> fx.fit(runs, step, [torch.tensor(1.0)], steps=1, callbacks=fx.ensemble.across(copy_best)).state.params["w"]
        tensor([1., 1.])
    """
    if isinstance(callback, Composed):
        raise TypeError(f"expected one callback, got {len(callback)} composed. Give each to fxtrain.ensemble.across.")
    handler = handler_of(callback)
    traced = next((kind for kind in TRACED if kind in handler.events), None)
    if traced is not None:
        raise ValueError(
            f"expected a callback of the loop for across, got {handler.name} on {traced.__name__} inside the step, "
            "which is that of one member. Subscribe to StepEnd, EvalEnd or EpochEnd."
        )
    if handler.slot is not None:
        raise ValueError(
            f"expected a callback without a slot for across, got {name_of(callback)} with the slot {handler.slot!r}. "
            f"Keep {describe(handler.slot)} in another callback, and read it from state.slots."
        )
    return dataclasses.replace(handler, function=Across(handler.function))
