"""Composes callbacks into one and dispatches each event to those that subscribe to it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fxtrain import tree
from fxtrain.core import (
    EVENTS,
    LOOP,
    SESSION,
    TRACED,
    Control,
    EpochBegin,
    EpochEnd,
    EvalBegin,
    EvalEnd,
    EvalStep,
    FitBegin,
    FitEnd,
    Gradients,
    Microbatch,
    Restored,
    Rewound,
    Saved,
    StepBegin,
    StepEnd,
    TrainState,
    Updated,
    describe,
    name_of,
)
from fxtrain.equivalents import refuse_foreign
from fxtrain.fold._mistaken import refuse_mistaken
from fxtrain.fold._structure import refuse_other_structure
from fxtrain.fold._subscription import kinds, subscription, takes

_LOOP = frozenset({"stop", "skip_final_save", "end_epoch", "evaluate", "save", "rewind"})
_INSIDE_EVALUATION = _LOOP - {"evaluate"}  # nested evaluations would never end
_ONLY_LOG: frozenset[str] = frozenset()

ASKABLE: Mapping[type[Any], frozenset[str]] = {
    Microbatch: frozenset({"stop", "skip_final_save", "skip_update"}),
    Gradients: frozenset({"stop", "skip_final_save", "skip_update"}),
    Updated: frozenset({"stop", "skip_final_save"}),  # too late for skip_update
    EpochBegin: _LOOP,
    StepBegin: _LOOP | {"skip_batch"},
    StepEnd: _LOOP,
    EvalBegin: _INSIDE_EVALUATION,
    EvalStep: _INSIDE_EVALUATION,
    EvalEnd: _INSIDE_EVALUATION,
    EpochEnd: _LOOP - {"end_epoch"},
    Rewound: frozenset({"stop", "skip_final_save"}),
    # No evaluation at session events: an interrupted run would evaluate more often, which callbacks would count.
    FitBegin: frozenset({"stop", "skip_final_save", "save"}),
    Restored: frozenset({"stop", "skip_final_save"}),
    Saved: frozenset({"stop", "skip_final_save"}),
}
"""The requests that are allowed at each event. At events that are not listed, callbacks can only log."""

_NOTHING = Control()


@dataclasses.dataclass(frozen=True)
class Needs:
    """The requirements of a callback. See ``needs`` for the fields."""

    eval_metrics: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    events: tuple[type[Any], ...] = ()


@dataclasses.dataclass(frozen=True, repr=False)
class Handler:
    """A callback with its name, subscription and slot. A handler is itself a callback.

    Args:
        name: The name in errors, reasons and the repr of composed callbacks.
        function: The callback.
        events: The event types that it sees.
        slot: The slot that holds its state, or None.
        init: Maps the training state to the initial content of the slot, a pytree of tensors.
        needs: Its requirements.
    """

    name: str
    function: Callable[[TrainState, Any], tuple[TrainState, Control]]
    events: frozenset[type[Any]]
    slot: str | None = None
    init: Callable[[TrainState], Any] | None = None
    needs: Needs = Needs()

    def __call__(self, state: TrainState, event: Any, /) -> tuple[TrainState, Control]:
        if type(event) not in self.events:
            return state, Control()
        return self.function(state, event)

    def __repr__(self) -> str:
        names = ", ".join(kind.__name__ for kind in EVENTS if kind in self.events)
        return f"<callback {self.name} on {names}{f', slot {self.slot!r}' if self.slot else ''}>"


class Composed:
    """Callbacks composed into one by ``compose``. Its repr lists the callbacks that see each event."""

    def __init__(self, handlers: tuple[Handler, ...]) -> None:
        self.handlers = handlers
        self.table: Mapping[type[Any], tuple[Handler, ...]] = {
            kind: seen for kind in EVENTS if (seen := tuple(h for h in handlers if kind in h.events))
        }
        # Kept next to the table, so that a callback that requests nothing costs no more than its call.
        self._functions = {kind: tuple(h.function for h in seen) for kind, seen in self.table.items()}
        owners: dict[str, Handler] = {}
        for handler in handlers:
            if handler.slot is not None and handler.slot in owners:
                raise ValueError(
                    f"expected one callback for the slot {handler.slot!r}, got {owners[handler.slot].name} and "
                    f"{handler.name}. Give one of them another name."
                )
            if handler.slot is not None:
                owners[handler.slot] = handler
        self.slots: Mapping[str, Handler] = owners

    @property
    def traced_slots(self) -> frozenset[str]:
        """The slots of callbacks that subscribe to traced events. These enter the compiled step."""
        return frozenset(name for name, handler in self.slots.items() if not handler.events.isdisjoint(TRACED))

    def __call__(self, state: TrainState, event: Any, /) -> tuple[TrainState, Control]:
        kind = typing.cast(type[Any], type(event))
        total = _NOTHING
        for index, function in enumerate(self._functions.get(kind, ())):
            result = function(state, event)
            if type(result) is tuple and len(result) == 2 and result[0] is state and type(result[1]) is Control:
                control = result[1]
            else:
                before, handler = state, self.table[kind][index]
                state, control = checked(handler, event, result)
                if state is not before:
                    _refuse_overreach(handler, kind, before, state)
                    refuse_other_structure(handler.name, kind, before, state)
            if control.requests or control.log:  # faster than `if control`
                handler = self.table[kind][index]
                _refuse_impossible_requests(handler, kind, control)
                total = total | control.owned_by(handler.name)
        return state, total

    def __repr__(self) -> str:
        if not self.handlers:
            return "No callbacks"
        width = max(len(kind.__name__) for kind in self.table)
        rows = [f"  {kind.__name__:<{width}}  {', '.join(h.name for h in seen)}" for kind, seen in self.table.items()]
        kept = f"  slots: {', '.join(map(repr, self.slots))}" if self.slots else ""
        count = len(self.handlers)
        return "\n".join([f"{count} callback{'s' if count > 1 else ''}", *rows, *([kept] if kept else [])])


def compose(*callbacks: Callable[..., Any]) -> Composed:
    """Composes callbacks into one that runs them in order. Each sees the state left by those before it.

    Subscriptions are read here, once, from the annotation of each callback's second parameter: an event type, a
    union, or a string naming one. A callback without an annotation sees all trajectory events.

    Args:
        callbacks: Functions ``(state, event) -> (state, control)``, or composed callbacks, which are flattened.

    Raises:
        TypeError: If an annotation does not name an event, or if a wrapper hides the signature.
        ValueError: If two callbacks claim the same slot.

    Example:
        >>> from fxtrain import Control, EvalEnd
        >>> def stop_when_good(state, event: EvalEnd):
        ...     return state, Control(stop=event.metrics["loss"] < 0.1, reason="loss below 0.1")
        >>> compose(stop_when_good)
        1 callback
          EvalEnd  stop_when_good
    """
    handlers: list[Handler] = []
    for callback in callbacks:
        handlers.extend(callback.handlers if isinstance(callback, Composed) else (handler_of(callback),))
    return Composed(tuple(handlers))


def on(events: Any, callback: Callable[..., Any]) -> Handler:
    """Subscribes ``callback`` to ``events``, in place of its annotation.

    Args:
        events: An event type, a union or a tuple of event types.
        callback: ``(state, event) -> (state, control)``.

    Example:
        >>> import fxtrain as fx
        >>> on(fx.EvalEnd | fx.EpochEnd, lambda state, event: (state, fx.Control(save=True)))
        <callback <lambda> on EvalEnd, EpochEnd>
    """
    parts = typing.cast(tuple[Any, ...], events) if isinstance(events, tuple) else (events,)
    seen = frozenset(kind for part in parts for kind in kinds(part))
    if isinstance(callback, Handler):
        return dataclasses.replace(callback, events=seen)
    return Handler(name_of(callback), callback, seen)


def slotted(
    name: str, init: Callable[[TrainState], Any], callback: Callable[..., Any], *, label: str | None = None
) -> Handler:
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


def stateful(name: str, init: Callable[[TrainState], Any], update: Callable[..., tuple[Any, Control]]) -> Handler:
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
    function: Callable[..., Any] = update.function if isinstance(update, Handler) else update

    def callback(state: TrainState, event: Any) -> tuple[TrainState, Control]:
        result = function(state, event, _slot_content(state, name))
        if isinstance(result, tuple):
            pair = typing.cast(tuple[Any, ...], result)
            if len(pair) == 2 and isinstance(pair[1], Control):
                return state.with_slot(name, pair[0]), pair[1]
        raise TypeError(
            f"{name}: expected its update to return (content of the slot, control) at {type(event).__name__}, got "
            f"{describe(result)}. To request nothing, return the content and Control()."
        )

    return slotted(name, init, on(tuple(events), callback))


def attach(state: TrainState, callbacks: Callable[..., Any] | Iterable[Callable[..., Any]]) -> TrainState:
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


def as_composed(callbacks: Any) -> Composed:
    """Composes a callback, an iterable of callbacks, or those of an object with a ``callbacks`` attribute."""
    folded = getattr(callbacks, "callbacks", callbacks)
    if isinstance(folded, Composed):
        return folded
    if isinstance(folded, Iterable):
        return compose(*typing.cast(Iterable[Any], folded))
    return compose(folded)


def checked(handler: Handler, event: Any, result: Any) -> tuple[TrainState, Control]:
    """Returns the result of a callback, after checking that it is a state and a control.

    Args:
        handler: The callback.
        event: The event that it saw.
        result: Its return value.

    Raises:
        TypeError: If ``result`` is not ``(state, control)``.
    """
    if isinstance(result, tuple):
        pair = typing.cast(tuple[Any, ...], result)
        if len(pair) == 2 and isinstance(pair[0], TrainState) and isinstance(pair[1], Control):
            return pair[0], pair[1]
    raise TypeError(
        f"{handler.name}: expected it to return (state, control) at {type(event).__name__}, got {describe(result)}. "
        "To request nothing, return state and Control()."
    )


def _refuse_impossible_requests(handler: Handler, kind: type[Any], control: Control) -> None:
    possible = ASKABLE.get(kind, _ONLY_LOG)
    for request in control.kinds:
        if request not in possible:
            where = [event.__name__ for event in EVENTS if request in ASKABLE.get(event, _ONLY_LOG)]
            raise ValueError(
                f"{handler.name}: expected requests that are possible at {kind.__name__}, got {request}. Request it at "
                f"{', '.join(where)}."
            )


_WRITABLE = {**dict.fromkeys(TRACED, ("slots",)), **dict.fromkeys(SESSION, ())}
_FIELDS = tuple(field.name for field in dataclasses.fields(TrainState))


def _refuse_overreach(handler: Handler, kind: type[Any], before: TrainState, after: TrainState) -> None:
    if kind not in _WRITABLE or kind is FitEnd:
        return
    for field in _FIELDS:
        if field not in _WRITABLE[kind] and not _same(getattr(before, field), getattr(after, field)):
            allowed, remedy = (
                ("writes to slots only", "Request skip_update, or change it at StepEnd.")
                if kind in TRACED
                else ("no changes", "How often this event fires depends on interruptions, so use a trajectory event.")
            )
            raise ValueError(
                f"{handler.name} changed state.{field} at {kind.__name__}: expected {allowed}, got another value. "
                f"{remedy}"
            )


def _same(first: Any, second: Any) -> bool:
    """Whether two trees hold the same leaf objects. Dynamo tracks the identity of tensors, but not of containers."""
    leaves, others = tree.leaves(first), tree.leaves(second)
    return len(leaves) == len(others) and all(leaf is other for leaf, other in zip(leaves, others, strict=True))


def _slot_content(state: TrainState, name: str) -> Any:
    try:
        return state.slots[name]
    except KeyError:
        there = ", ".join(repr(slot) for slot in state.slots if not slot.startswith(LOOP)) or "none"
        raise KeyError(
            f"expected the state to have the slot {name!r}, got {there}. Call fxtrain.attach(state, callbacks) first."
        ) from None


def handler_of(callback: Any) -> Handler:
    """Returns the handler of a callback, with its name and its subscription."""
    if isinstance(callback, Handler):
        _refuse_observer(callback.function)
        return callback
    refuse_mistaken(callback, "callbacks")
    refuse_foreign("each callback", "a function (state, event) -> (state, control)", callback)
    if not callable(callback):
        raise TypeError(
            f"callbacks: expected functions (state, event) -> (state, control), got {describe(callback)}. Write such a "
            "function, or use one of fxtrain.callbacks."
        )
    if isinstance(callback, type):
        raise TypeError(
            "callbacks: expected functions (state, event) -> (state, control), got the class "
            f"{callback.__name__}. Pass an instance."
        )
    _refuse_observer(callback)
    return Handler(name_of(callback), typing.cast(Any, callback), frozenset(subscription(callback)))


def _refuse_observer(callback: Callable[..., Any]) -> None:
    if takes(callback, 3) and not takes(callback, 2):
        raise TypeError(
            f"callbacks: expected functions (state, event), got {name_of(callback)}, which requires a third argument "
            "as observers do. Pass it in observers=."
        )
