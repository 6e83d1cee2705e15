"""Gives the traced callbacks of a run to its step, and the callbacks of a step to the run."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any, TypeVar

from fxtrain.core import TRACED, Callback
from fxtrain.fold import Composed, Handler, as_composed, compose

S = TypeVar("S")


def shared(step: S, callbacks: Callback | Iterable[Callback]) -> tuple[S, Composed]:
    """Returns a step and the callbacks of a run such that each callback sees all of its events once.

    A callback can be given to the step, to the run, or to both. Inside the step, its own callbacks come first, and the
    others follow in the order of the run. In the loop, callbacks that only the step was given come first.

    Args:
        step: A step with the attribute ``fires``.
        callbacks: The callbacks given to the run.

    Returns:
        The step that folds all traced callbacks, which is ``step`` itself if it already does, and the callbacks to fold
        in the loop.

    Raises:
        ValueError: If a callback subscribes to a traced event that the step does not fire, if the step cannot fold it,
            or if two callbacks claim the same slot.
    """
    own, callbacks = as_composed(step), as_composed(callbacks)
    for handler in callbacks.handlers:
        _refuse_unfired(step, handler)
        twin = own.slots.get(handler.slot) if handler.slot is not None else None
        if twin is not None and identity(twin) != identity(handler):
            raise ValueError(
                f"expected one callback for the slot {handler.slot!r}, got {twin.name} of the step and another "
                f"{handler.name}. Make the callback once, or give one of them another name."
            )
    others = traced_others(own, callbacks)
    if others:
        folding_others: Any = getattr(step, "with_callbacks", None)
        if folding_others is None:
            raise refused(others[0])
        step = folding_others(callbacks)
    return step, compose(*without(own, callbacks), *callbacks.handlers)


def traced_others(own: Composed, callbacks: Composed) -> tuple[Handler, ...]:
    """Returns the traced callbacks among ``callbacks`` that are not among ``own``."""
    return tuple(handler for handler in without(callbacks, own) if not handler.events.isdisjoint(TRACED))


def without(callbacks: Composed, others: Composed) -> tuple[Handler, ...]:
    """Returns the callbacks that are not among ``others``."""
    known = set(map(identity, others.handlers))
    return tuple(handler for handler in callbacks.handlers if identity(handler) not in known)


def identity(handler: Handler) -> tuple[object, ...]:
    """Returns a key that is equal for handlers of the same callback object with the same events and slot."""
    function = handler.function
    # Each access to a method makes another object.
    key = (id(function.__self__), id(function.__func__)) if isinstance(function, types.MethodType) else id(function)
    return key, handler.events, handler.slot


def refused(handler: Handler) -> ValueError:
    """Returns the error for a step that cannot fold a callback besides its own."""
    kind = next(kind for kind in TRACED if kind in handler.events)
    return ValueError(
        f"expected a step that folds {handler.name}, which subscribes to {kind.__name__} inside the step, got one "
        "without it that is hand-written or compiled by torch.compile. Give the callback to fxtrain.train_step, or "
        "fold it in the function and declare it: fxtrain.Step(function, callbacks=..., fires=...)."
    )


def _refuse_unfired(step: object, handler: Handler) -> None:
    fired: frozenset[type[object]] = getattr(step, "fires", frozenset())
    kind = next((kind for kind in TRACED if kind in handler.events and kind not in fired), None)
    if kind is not None:
        fires = ", ".join(kind.__name__ for kind in TRACED if kind in fired) or "none"
        raise ValueError(
            f"expected a step that fires {kind.__name__} for {handler.name}, got one that fires {fires}. Use "
            "fxtrain.train_step, or declare the events of a hand-written step: "
            "fxtrain.Step(function, callbacks=..., fires=...)."
        )
