"""Callbacks with a slot, in which their state is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import cast

from fxtrain import tree
from fxtrain.core import LOOP, Callback, Control, Event, StepFn, TrainState, Tree, describe
from fxtrain.fold._compose import as_composed
from fxtrain.fold._handler import Handler, elements_of, handler_of, on
from fxtrain.fold._subscription import subscription


def slotted(name: str, init: Callable[[TrainState], Tree], callback: Callback, *, label: str | None = None) -> Handler:
    """Reserves the slot ``name`` for ``callback``, which manages its content itself.

    The callback reads ``state.slots[name]`` and writes with ``state.with_slot(name, content)``. ``stateful`` does both
    for it.

    Args:
        name: The slot's name, also in checkpoints.
        init: Maps the training state to the slot's initial content, a pytree of tensors.
        callback: ``(state, event) -> (state, control)``.
        label: The callback's name; the slot's name by default.

    Example:
        >>> import torch, fxtrain as fx
        >>> def count(state, event: fx.StepEnd):
        ...     return state.with_slot("counter", state.slots["counter"] + 1), fx.Control()
        >>> slotted("counter", lambda state: torch.tensor(0), count)
        <callback counter on StepEnd, slot 'counter'>
    """
    if not name or not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"expected a non-empty string as the slot's name, got {describe(name)}.")
    if name.startswith(LOOP):
        raise ValueError(f"expected a slot name without the prefix {LOOP!r}, which the loop reserves, got {name!r}.")
    handler = handler_of(callback)
    return dataclasses.replace(handler, name=label or name, slot=name, init=init)


def stateful(name: str, init: Callable[[TrainState], Tree], update: Callable[..., tuple[Tree, Control]]) -> Handler:
    """Makes a callback whose state is kept in ``state.slots[name]``, and so in every checkpoint.

    Args:
        name: The slot's name.
        init: Maps the training state to the slot's initial content, a pytree of tensors.
        update: ``(state, event, content) -> (content, control)``, subscribed by the annotation of ``event``. The
            content must keep its containers, shapes, dtypes and devices.

    Raises:
        TypeError: When the callback runs, if ``update`` did not return ``(content, control)``.
        ValueError: When the callback runs, if the content changed in structure, shape, dtype or device.

    Example:
        >>> import torch, fxtrain as fx
        >>> def update(state, event: fx.StepEnd, count):
        ...     return count + 1, fx.Control(log={"steps seen": count + 1})
        >>> stateful("counter", lambda state: torch.tensor(0), update)
        <callback counter on StepEnd, slot 'counter'>
    """

    # A handler made by `on` carries its subscription and has no annotation to read.
    events = update.events if isinstance(update, Handler) else subscription(update)
    function = cast("Callable[..., object]", update.function if isinstance(update, Handler) else update)

    def callback(state: TrainState, event: Event) -> tuple[TrainState, Control]:
        result = function(state, event, _slot_content(state, name))
        pair = elements_of(result)
        if len(pair) == 2 and isinstance(pair[1], Control):
            return state.with_slot(name, pair[0]), pair[1]
        raise TypeError(
            f"{name}: expected its update to return (content of the slot, control) at {type(event).__name__}, got "
            f"{describe(result)}. To request nothing, return the content and Control()."
        )

    return slotted(name, init, on(tuple(events), callback))


def attach(state: TrainState, callbacks: Callback | StepFn | Iterable[Callback]) -> TrainState:
    """Returns ``state`` with the missing slots of ``callbacks`` initialized. Existing slots are kept.

    Args:
        state: The training state.
        callbacks: A callback, several in an iterable, or a step that folds callbacks.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(1, 1), fx.optim.sgd(0.1))
        >>> list(attach(state, fx.callbacks.early_stopping("loss", patience=2)).slots)
        ['early_stopping']
    """
    handlers = as_composed(callbacks).slots
    missing = {name: handler.init for name, handler in handlers.items() if name not in state.slots}
    for name, init in missing.items():
        if init is not None:
            # Cloned, because an initial content is often a view of the parameters, and no two leaves of a state may
            # share storage.
            state = state.with_slot(name, tree.clone(init(state)))
    return state


def _slot_content(state: TrainState, name: str) -> Tree:
    try:
        return state.slots[name]
    except KeyError:
        there = ", ".join(repr(slot) for slot in state.slots if not slot.startswith(LOOP)) or "none"
        raise KeyError(
            f"expected the state to have the slot {name!r}, got {there}. Call fxtrain.attach(state, callbacks) first."
        ) from None
