"""Composes callbacks into one, dispatches each event to those that subscribe to it, and attaches their slots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from fxtrain import tree
from fxtrain.core import EVENTS, TRACED, Callback, Control, Event, StepFn, TrainState
from fxtrain.fold._checks import refuse_impossible_requests, refuse_other_structure, refuse_overreach
from fxtrain.fold._handler import Handler, checked_result, handler_of

_NOTHING = Control()


class Composed:
    """Callbacks composed into one by ``compose``. Its repr lists the callbacks that see each event.

    Args:
        handlers: The callbacks, in order.

    Example:
        >>> import fxtrain as fx
        >>> composed = fx.compose(fx.callbacks.save(every=10), fx.callbacks.early_stopping("loss", patience=2))
        >>> isinstance(composed, Composed), list(composed.slots)
        (True, ['early_stopping'])
    """

    def __init__(self, handlers: tuple[Handler, ...]) -> None:
        self.handlers = handlers
        self.table: Mapping[type[Event], tuple[Handler, ...]] = {
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

    def __call__(self, state: TrainState, event: Event, /) -> tuple[TrainState, Control]:
        kind = type(event)
        total = _NOTHING
        for index, function in enumerate(self._functions.get(kind, ())):
            result = function(state, event)
            if type(result) is tuple and len(result) == 2 and result[0] is state and type(result[1]) is Control:
                control = result[1]
            else:
                before, handler = state, self.table[kind][index]
                state, control = checked_result(handler, event, result)
                if state is not before:
                    refuse_overreach(handler.name, kind, before, state)
                    refuse_other_structure(handler.name, kind, before, state)
            if control.requests or control.log:  # faster than `if control`
                handler = self.table[kind][index]
                refuse_impossible_requests(handler.name, kind, control)
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


def compose(*callbacks: Callback) -> Composed:
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


def as_composed(callbacks: object) -> Composed:
    """Composes a callback, an iterable of callbacks, or those of an object with a ``callbacks`` attribute."""
    folded = getattr(callbacks, "callbacks", callbacks)
    if isinstance(folded, Composed):
        return folded
    if isinstance(folded, Iterable):
        return compose(*cast("Iterable[Callback]", folded))
    return compose(cast("Callback", folded))


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
    for name, handler in as_composed(callbacks).slots.items():
        if name not in state.slots and handler.init is not None:
            # Cloned, because an initial content is often a view of the parameters, and no two leaves of a state may
            # share storage.
            state = state.with_slot(name, tree.clone(handler.init(state)))
    return state
