"""A callback with its name, subscription, slot and needs, and the functions that declare these."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import cast

import torch

from fxtrain.core import (
    EVENTS,
    LOOP,
    TRACED,
    Callback,
    Control,
    Event,
    LoopEvent,
    Record,
    TrainState,
    Tree,
    check_callable,
    check_choice,
    describe,
    name_of,
    takes,
)
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.fold._lookalikes import refuse_lookalikes
from fxtrain.fold._subscription import kinds, subscription
from fxtrain.values import KINDS_BY_NAME

EventTypes = type[Event] | type[LoopEvent] | types.UnionType
"""An event type, a base class of several, or a union."""

Init = Callable[[TrainState], Tree]
"""Maps the training state to the initial content of a slot, a pytree of tensors."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Needs(Record):
    """The requirements of a callback. See ``needs`` for the fields."""

    eval_metrics: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    events: tuple[type[Event], ...] = ()
    written: tuple[str, ...] = ()
    checks: tuple[Callable[[TrainState], None], ...] = ()
    one_run: str = ""  # what to do instead, if the callback cannot be one of a batch of runs


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Handler(Record):
    """A callback with its name, subscription and slot. A handler is itself a callback.

    Args:
        name: The name in errors, reasons and the repr of composed callbacks.
        function: The callback.
        events: The event types that it sees.
        slot: The slot that holds its state, or None.
        init: Maps the training state to the initial content of the slot, a pytree of tensors.
        needs: Its requirements.
        errors: The slot that counts its errors, if it is tolerant.

    Example:
        >>> import fxtrain as fx
        >>> stop = fx.callbacks.stop_at("loss", 0.1)
        >>> stop.name, stop.slot, [event.__name__ for event in stop.events]
        ('stop_at loss', None, ['EvalEnd'])
    """

    name: str
    function: Callback
    events: frozenset[type[Event]]
    slot: str | None = None
    init: Init | None = None
    needs: Needs = Needs()
    errors: str | None = None

    @property
    def inits(self) -> dict[str, Init | None]:
        """How each slot of the callback is initialized, by name."""
        own = {} if self.slot is None else {self.slot: self.init}
        return own if self.errors is None else {**own, self.errors: _zero}

    def __call__(self, state: TrainState, event: Event, /) -> tuple[TrainState, Control]:
        if type(event) not in self.events:
            return state, Control()
        return self.function(state, event)

    def wrapped(self, wrap: Callable[[Handler], Callback], name: str = "", errors: str | None = None) -> Handler:
        """Returns a callback with the function ``wrap(handler)``, which calls that of ``handler``.

        Args:
            wrap: Makes the function. It is called for each of the functions of ``OfMembers``.
            name: The name, if it changes.
            errors: The slot that counts its errors, if it becomes tolerant.
        """
        function = self.function.over(self, wrap) if isinstance(self.function, OfMembers) else wrap(self)
        return dataclasses.replace(self, name=name or self.name, function=function, errors=errors or self.errors)

    def __repr__(self) -> str:
        names = ", ".join(kind.__name__ for kind in EVENTS if kind in self.events)
        return f"<callback {self.name} on {names}{f', slot {self.slot!r}' if self.slot else ''}>"


class OfMembers:
    """A function of a callback that depends on the members of a batch of runs."""

    def over(self, handler: Handler, wrap: Callable[[Handler], Callback]) -> Callback:
        """Returns this function with those that it calls wrapped, as for ``Handler.wrapped``."""
        raise NotImplementedError


def _zero(state: TrainState) -> Tree:
    return torch.zeros((), dtype=torch.int64, device=state.step.device)


@with_short_traceback
def on(events: EventTypes | tuple[EventTypes, ...], callback: Callback) -> Handler:
    """Subscribes ``callback`` to ``events``, in place of its annotation.

    Args:
        events: An event type, a union or a tuple of event types.
        callback: ``(state, event) -> (state, control)``.

    Example:
        >>> import fxtrain as fx
        >>> on(fx.EvalEnd | fx.EpochEnd, lambda state, event: (state, fx.Control(save=True)))
        <callback <lambda> on EvalEnd, EpochEnd>
    """
    parts = events if isinstance(events, tuple) else (events,)
    seen = frozenset(kind for part in parts for kind in kinds(part))
    if isinstance(callback, Handler):
        return dataclasses.replace(callback, events=seen)
    return Handler(name_of(callback), callback, seen)


def handler_of(callback: object) -> Handler:
    """Returns the handler of a callback, with its name and its subscription."""
    if isinstance(callback, Handler):
        _refuse_observer(callback.function)
        return callback
    refuse_lookalikes(callback, "callbacks")
    if not callable(callback):
        raise TypeError(
            f"callbacks: expected functions (state, event) -> (state, control), got {describe(callback)}. Write such a "
            "function, or use one of fxtrain.callbacks."
        )
    if isinstance(callback, type):
        raise TypeError(
            "callbacks: expected functions (state, event) -> (state, control), got the class "
            f"{callback.__name__}. Make an instance: {callback.__name__}()."
        )
    _refuse_observer(callback)
    return Handler(name_of(callback), cast("Callback", callback), frozenset(subscription(callback)))


def _refuse_observer(callback: Callable[..., object]) -> None:
    if takes(callback, 3) and not takes(callback, 2):
        raise TypeError(
            f"callbacks: expected functions (state, event), got {name_of(callback)}, which requires a third argument "
            "as observers do. Pass it in observers=."
        )


def _elements_of(result: object) -> tuple[object, ...]:
    """Returns the elements of a tuple, or none for any other value."""
    return cast("tuple[object, ...]", result) if isinstance(result, tuple) else ()


def checked_result(handler: Handler, event: Event, result: object) -> tuple[TrainState, Control]:
    """Returns the result of a callback, after checking that it is a state and a control.

    Args:
        handler: The callback.
        event: The event that it saw.
        result: Its return value.

    Raises:
        TypeError: If ``result`` is not ``(state, control)``.
    """
    pair = _elements_of(result)
    if len(pair) == 2 and isinstance(pair[0], TrainState) and isinstance(pair[1], Control):
        return pair[0], pair[1]
    raise TypeError(
        f"{handler.name}: expected it to return (state, control) at {type(event).__name__}, got {describe(result)}. "
        "To request nothing, return state and Control()."
    )


@with_short_traceback
def needs(
    callback: Callback,
    *,
    eval_metrics: Sequence[str] = (),
    slots: Sequence[str] = (),
    events: Sequence[type[Event]] = (),
    written: Sequence[str] = (),
    check: Callable[[TrainState], None] | None = None,
) -> Handler:
    """Declares requirements of ``callback``. ``fit`` raises before the first step if one is not met.

    Args:
        callback: ``(state, event) -> (state, control)``.
        eval_metrics: Names of evaluation metrics. They are checked by running the evaluation step on fake tensors or,
            if that is not possible, at the first evaluation.
        slots: Slots that are kept by other callbacks.
        events: Traced events that the step must fire, in addition to those that the callback subscribes to.
        written: Kinds of logged values that a writer of the run must keep, such as ``"images"``: ``"scalars"`` or a
            name in ``fxtrain.values.KINDS``. The writers of ``fxtrain.observers.write`` count, and observers with an
            attribute ``keeps``, a set of the classes of ``fxtrain.values``. It is checked on rank 0, which writes.
        check: ``check(state)`` raises if the callback cannot use such a state. It is called before the first step.

    Raises:
        TypeError: If an event is not traced.
        ValueError: If a kind is unknown.

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
    for kind in written:
        check_choice("a kind in written", kind, tuple(KINDS_BY_NAME))
    handler = handler_of(callback)
    old = handler.needs
    both = Needs(
        (*old.eval_metrics, *eval_metrics),
        (*old.slots, *slots),
        (*old.events, *events),
        (*old.written, *written),
        (*old.checks, *(() if check is None else (check,))),
        old.one_run,
    )
    return dataclasses.replace(handler, needs=both)


@with_short_traceback
def slotted(name: str, init: Callable[[TrainState], Tree], callback: Callback, *, label: str | None = None) -> Handler:
    """Reserves the slot ``name`` for ``callback``, which manages its content itself.

    The callback reads ``state.slots[name]`` and writes with ``state.with_slot(name, content)``. ``stateful`` does both
    for it.

    Args:
        name: The slot's name, also in checkpoints.
        init: Maps the training state to the slot's initial content, a pytree of tensors.
        callback: ``(state, event) -> (state, control)``.
        label: The callback's name; the slot's name by default.

    Raises:
        TypeError: If ``callback`` is no function of a state and an event, or ``init`` no function of a state.
        ValueError: If the name is empty or reserved.

    Example:
        >>> import torch, fxtrain as fx
        >>> def count(state, event: fx.StepEnd):
        ...     return state.with_slot("counter", state.slots["counter"] + 1), fx.Control()
        >>> slotted("counter", lambda state: torch.tensor(0), count)
        <callback counter on StepEnd, slot 'counter'>
    """
    if not name or not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"expected a non-empty string as the slot's name, got {describe(name)}. Give the name first.")
    if name.startswith(LOOP):
        raise ValueError(f"expected a slot name without the prefix {LOOP!r}, which the loop reserves, got {name!r}.")
    check_callable(f"init of slot {name!r}", init, "(state) -> content")
    if not takes(init, 1):
        raise TypeError(
            f"expected init of slot {name!r} to be a function (state) -> content, got {name_of(init)}, which does not "
            "take one argument. Take the state: lambda state: torch.tensor(0)."
        )
    function = callback.function if isinstance(callback, Handler) else callback
    if takes(function, 3) and not takes(function, 2):
        raise TypeError(
            f"expected the callback of slot {name!r} to take (state, event), got {name_of(function)}, which requires a "
            f"third argument. Read the content of the slot from state.slots[{name!r}], or use fxtrain.stateful."
        )
    return dataclasses.replace(handler_of(callback), name=label or name, slot=name, init=init)


@with_short_traceback
def stateful(name: str, init: Callable[[TrainState], Tree], update: Callable[..., tuple[Tree, Control]]) -> Handler:
    """Makes a callback whose state is kept in ``state.slots[name]``, and so in every checkpoint.

    Args:
        name: The slot's name.
        init: Maps the training state to the slot's initial content, a pytree of tensors.
        update: ``(state, event, content) -> (content, control)``, subscribed by the annotation of ``event``. The
            content must keep its containers, shapes, dtypes and devices.

    Raises:
        TypeError: If ``update`` takes no content, or, when the callback runs, if it did not return
            ``(content, control)``.
        ValueError: When the callback runs, if the content changed in structure, shape, dtype or device.

    Example:
        >>> import torch, fxtrain as fx
        >>> def update(state, event: fx.StepEnd, count):
        ...     return count + 1, fx.Control(log={"steps seen": count + 1})
        >>> stateful("counter", lambda state: torch.tensor(0), update)
        <callback counter on StepEnd, slot 'counter'>
    """

    check_callable(f"the update of slot {describe(name)}", update, "(state, event, content) -> (content, control)")
    # A handler made by `on` carries its subscription and has no annotation to read.
    events = update.events if isinstance(update, Handler) else subscription(update)
    function = cast("Callable[..., object]", update.function if isinstance(update, Handler) else update)
    if takes(function, 2) and not takes(function, 3):
        raise TypeError(
            f"expected the update of slot {name!r} to take (state, event, content), got {name_of(function)}, which "
            "takes no third argument. Add one for the content of the slot, and return (content, control), or use "
            "fxtrain.slotted."
        )

    def callback(state: TrainState, event: Event) -> tuple[TrainState, Control]:
        try:
            content = state.slots[name]
        except KeyError:
            there = ", ".join(repr(slot) for slot in state.slots if not slot.startswith(LOOP)) or "none"
            raise KeyError(
                f"expected the state to have the slot {name!r}, got {there}. Call fxtrain.attach(state, callbacks) "
                "first."
            ) from None
        result = function(state, event, content)
        pair = _elements_of(result)
        if len(pair) == 2 and isinstance(pair[1], Control):
            return state.with_slot(name, pair[0]), pair[1]
        raise TypeError(
            f"{name}: expected its update to return (content of the slot, control) at {type(event).__name__}, got "
            f"{describe(result)}. To request nothing, return the content and Control()."
        )

    return slotted(name, init, on(tuple(events), callback))
