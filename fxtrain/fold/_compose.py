"""Composes callbacks into one, dispatches each event to those that subscribe to it, and attaches their slots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

from fxtrain import tree
from fxtrain.core import (
    EVENTS,
    TRACED,
    Callback,
    Control,
    Event,
    StepFn,
    TrainState,
    check_train_state,
    describe,
    did_you_mean,
    name_of,
    pluralize,
)
from fxtrain.core._html import html_view, left_out, table, view
from fxtrain.core._orphaned_slot import OrphanedSlot
from fxtrain.core._shard import holds_shards, refuse_shards
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.fold._checks import cause_of, refuse_impossible_requests, refuse_other_structure, refuse_overreach
from fxtrain.fold._handler import Handler, checked_result, handler_of

_NOTHING = Control()
_MAX_SHOWN = 50  # callbacks in a view


class Composed:
    """Callbacks composed into one by ``compose``. Its repr lists the callbacks that see each event.

    It is an ordered collection of its callbacks: ``callbacks[name]`` is one of them, and ``in`` takes a name or a
    callback. A composition is immutable, so the callbacks of a run are fixed when it starts. ``without``, ``replace``
    and ``compose(callbacks, another)`` return a new composition for the next run.

    Args:
        handlers: The callbacks, in order.

    Example:
        >>> import fxtrain as fx
        >>> composed = fx.compose(fx.callbacks.save(every=10), fx.callbacks.early_stopping("loss", patience=2))
        >>> [callback.name for callback in composed], list(composed.slots)
        (['save when every(10)', 'early_stopping'], ['early_stopping'])
        >>> composed["early_stopping"]
        <callback early_stopping on EvalEnd, slot 'early_stopping'>
        >>> composed.replace("early_stopping", fx.callbacks.swa(start=100)).without("save when every(10)")
        1 callback
          Updated  swa
          slots: 'swa'
    """

    def __init__(self, handlers: tuple[Handler, ...]) -> None:
        self.handlers = handlers
        self.table: Mapping[type[Event], tuple[Handler, ...]] = {
            kind: seen for kind in EVENTS if (seen := tuple(h for h in handlers if kind in h.events))
        }
        # Functions next to their handlers, because a callback that requests nothing costs little more than its call.
        self._seen = {kind: tuple((h, h.function) for h in seen) for kind, seen in self.table.items()}
        owners: dict[str, Handler] = {}
        for handler in handlers:
            for slot in handler.inits:
                if slot in owners:
                    raise ValueError(
                        f"expected one callback for the slot {slot!r}, got {owners[slot].name} and {handler.name}. "
                        "Give one of them another name."
                    )
                owners[slot] = handler
        self.slots: Mapping[str, Handler] = owners

    @property
    def traced_slots(self) -> frozenset[str]:
        """The slots of callbacks that subscribe to traced events. These enter the compiled step."""
        return frozenset(name for name, handler in self.slots.items() if not handler.events.isdisjoint(TRACED))

    def __call__(self, state: TrainState, event: Event, /) -> tuple[TrainState, Control]:
        kind = type(event)
        total = _NOTHING
        for handler, function in self._seen.get(kind, ()):
            result = function(state, event)
            keeps_state = type(result) is tuple and len(result) == 2 and result[0] is state
            # Control() is always the same object, so most calls end here.
            if keeps_state and result[1] is _NOTHING:
                continue
            if keeps_state and type(result[1]) is Control:
                control = result[1]
            else:
                before = state
                state, control = checked_result(handler, event, result)
                if state is not before:
                    refuse_overreach(handler.name, cause_of(event), before, state)
                    refuse_other_structure(handler.name, kind, before, state)
            if control:
                refuse_impossible_requests(handler.name, cause_of(event), control)
                total = total | control.owned_by(handler.name)
        return state, total

    def __getitem__(self, name: str) -> Handler:
        return self.handlers[self._index(name)]

    def __contains__(self, which: object) -> bool:
        return any(_is(handler, which) for handler in self.handlers)

    def __iter__(self) -> Iterator[Handler]:
        return iter(self.handlers)

    def __len__(self) -> int:
        return len(self.handlers)

    def without(self, *which: str | Callback) -> Composed:
        """Returns the other callbacks, composed.

        Args:
            which: The callbacks to leave out, or their names.

        Raises:
            KeyError: If there is no such callback. The message suggests the nearest name.
            ValueError: If several callbacks have one of the names.
        """
        left_out = set(map(self._index, which))
        return Composed(tuple(handler for index, handler in enumerate(self.handlers) if index not in left_out))

    def replace(self, which: str | Callback, callback: Callback) -> Composed:
        """Returns the same callbacks with ``callback`` in the place of another.

        Args:
            which: The callback to replace, or its name.
            callback: Any callback. Composed callbacks are flattened.

        Raises:
            KeyError: If there is no such callback. The message suggests the nearest name.
            ValueError: If several callbacks have the name.
        """
        index = self._index(which)
        return compose(*self.handlers[:index], callback, *self.handlers[index + 1 :])

    def _index(self, which: str | Callback) -> int:
        found = [index for index, handler in enumerate(self.handlers) if _is(handler, which)]
        what = repr(which) if isinstance(which, str) else name_of(which) if callable(which) else describe(which)
        if not found:
            names = [handler.name for handler in self.handlers]
            raise KeyError(
                f"expected one of the callbacks {', '.join(map(repr, names)) or '(none)'}, got {what}."
                f"{did_you_mean(which, names)}"
            )
        if len(found) > 1:
            raise ValueError(
                f"expected the name of one callback, got {what}, which is that of {len(found)}. Compose the callbacks "
                f"to keep from list(callbacks), which has these at {', '.join(map(str, found))}."
            )
        return found[0]

    def __repr__(self) -> str:
        if not self.handlers:
            return "No callbacks"
        width = max(len(kind.__name__) for kind in self.table)
        rows = [f"  {kind.__name__:<{width}}  {', '.join(h.name for h in seen)}" for kind, seen in self.table.items()]
        kept = f"  slots: {', '.join(map(repr, self.slots))}" if self.slots else ""
        count = len(self.handlers)
        return "\n".join([f"{count} callback{'s' if count > 1 else ''}", *rows, *([kept] if kept else [])])

    @html_view
    def _repr_html_(self) -> str:
        shown = self.handlers[:_MAX_SHOWN]
        rows = [
            (handler.name, *("●" if kind in handler.events else "" for kind in self.table), ", ".join(handler.inits))
            for handler in shown
        ]
        heads = ("callback", *(kind.__name__ for kind in self.table), "slots")
        drawn = table(heads, rows, kind="matrix") if rows else ""
        return view(
            pluralize(len(self.handlers), "callback"), drawn, left_out(len(self.handlers) - len(shown), "callback")
        )


def _is(handler: Handler, which: object) -> bool:
    return handler.name == which if isinstance(which, str) else which in (handler, handler.function)


@with_short_traceback
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
    if isinstance(folded, Iterable) and not isinstance(folded, Mapping):
        return compose(*cast("Iterable[Callback]", folded))
    return compose(cast("Callback", folded))


@with_short_traceback
def attach(state: TrainState, callbacks: Callback | StepFn | Iterable[Callback]) -> TrainState:
    """Returns ``state`` with the missing slots of ``callbacks`` initialized. Existing slots are kept.

    A slot that ``restore`` kept for a callback that was not attached becomes the state of its callback.

    Args:
        state: The training state.
        callbacks: A callback, several in an iterable, or a step that folds callbacks.

    Raises:
        TypeError: If the initial content of a slot is not a pytree of tensors.
        ValueError: If a restored slot has other paths, shapes or dtypes than its callback.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(1, 1), fx.optim.sgd(0.1))
        >>> list(attach(state, fx.callbacks.early_stopping("loss", patience=2)).slots)
        ['early_stopping']
    """
    check_train_state(state, "attach(state, callbacks)", takes_shards=True)
    if holds_shards(state.params):
        refuse_shards(state, "attach(state, callbacks)")
    for name, handler in as_composed(callbacks).slots.items():
        content = state.slots.get(name)
        is_orphaned = isinstance(content, OrphanedSlot)
        if (name not in state.slots or is_orphaned) and (init := handler.inits[name]) is not None:
            initial = init(state)
            state = state.with_slot(name, content.rebuilt(name, initial) if is_orphaned else initial)
            # Cloned, because an initial content is often a view of the parameters, and no two leaves of a state may
            # share storage.
            state = state.with_slot(name, tree.clone(state.slots[name]))
    return state
