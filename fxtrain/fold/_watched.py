"""Composed callbacks that report the call of each of them."""

from __future__ import annotations

from collections.abc import Callable

from fxtrain.core import Control, Event, TrainState
from fxtrain.fold._compose import Composed

Outcome = tuple[TrainState, Control] | Exception
"""What a callback returned, as checked by the fold, or what it raised."""

Watch = Callable[[str, Event, TrainState, Outcome], None]
"""Receives the name of a callback, the event, the state that the callback received, and the outcome."""


class Watched(Composed):
    """The same callbacks, folded one by one, with a report of each call. The results are equal.

    Args:
        callbacks: The callbacks.
        watch: Called after each callback.

    Example:
        >>> import fxtrain as fx
        >>> seen = []
        >>> def watch(name, event, before, outcome):
        ...     seen.append((name, outcome[1].reasons("save")))
        >>> callbacks = Watched(fx.compose(fx.callbacks.save(every=2)), watch)
        >>> _ = callbacks(None, fx.StepEnd(step=2, metrics={}))
        >>> seen
        [('save when every(2)', ['a save is due'])]
    """

    def __init__(self, callbacks: Composed, watch: Watch) -> None:
        super().__init__(callbacks.handlers)
        self._watch = watch
        self._single = {kind: tuple(Composed((each,)) for each in seen) for kind, seen in self.table.items()}

    def __call__(self, state: TrainState, event: Event, /) -> tuple[TrainState, Control]:
        total = Control()
        for single in self._single.get(type(event), ()):
            (handler,), before = single.handlers, state
            try:
                state, control = single(before, event)
            except Exception as error:
                self._watch(handler.name, event, before, error)
                raise
            self._watch(handler.name, event, before, (state, control))
            total = total | control
        return state, total
