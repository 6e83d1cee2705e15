"""Callbacks whose errors leave the run as it was instead of ending it."""

from __future__ import annotations

import traceback

from fxtrain.core import SESSION, TRACED, Callback, Control, Event, TrainState, printable, warn
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.core._tracebacks import place, places
from fxtrain.fold._checks import cause_of, refuse_impossible_requests, refuse_other_structure, refuse_overreach
from fxtrain.fold._compose import Composed
from fxtrain.fold._handler import Handler, checked_result, handler_of
from fxtrain.values import check_loggable


@with_short_traceback
def tolerant(callback: Callback) -> Handler | Composed:
    """Makes an error of ``callback`` undo its call instead of ending the run.

    If the callback raises, or if the fold refuses what it returns, the state and its slot stay as they were before the
    call, and its requests are dropped. Training continues, and the callback is called again at its next event.

    The errors at trajectory events are counted: int64 [] in the slot ``errors/<name>``, so in every checkpoint. Each
    new count is logged under that name. The first error is also a warning, with the line that raised it. How often
    session events fire depends on interruptions, so errors there are a warning each and are not counted.

    KeyboardInterrupt and other exceptions that are not an ``Exception`` pass. A name that two callbacks log at one
    event is an error of both, which still ends the run.

    Args:
        callback: ``(state, event) -> (state, control)``, or composed callbacks, each of which is made tolerant.

    Raises:
        ValueError: If the callback subscribes to a traced event. Inside the compiled step nothing can be caught.

    Example:
        >>> import torch, warnings, fxtrain as fx
        >>> def sample(state, event: fx.EvalEnd):
        ...     raise ValueError("no prompt")
        >>> callback = fx.compose(fx.tolerant(sample))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        >>> with warnings.catch_warnings(record=True):
        ...     state, control = callback(state, fx.EvalEnd(step=5, metrics={}))
        >>> control
        Control(log={'errors/sample': tensor(1)})
    """
    if isinstance(callback, Composed):
        return Composed(tuple(map(_tolerant, callback.handlers)))
    return _tolerant(handler_of(callback))


def _tolerant(handler: Handler) -> Handler:
    traced = next((kind for kind in TRACED if kind in handler.events), None)
    if traced is not None:
        raise ValueError(
            f"expected a callback on events of the loop to be tolerant, got {handler.name}, which subscribes to "
            f"{traced.__name__} inside the compiled step, where nothing can be caught. Give it without "
            "fxtrain.tolerant, or do what may fail in a callback on StepEnd."
        )
    if handler.errors is not None:
        return handler
    slot = f"errors/{handler.name}"

    def contain(handler: Handler) -> Callback:
        def contained(state: TrainState, event: Event) -> tuple[TrainState, Control]:
            try:
                return _checked_call(handler, state, event)
            except Exception as error:
                if cause_of(event) in SESSION:
                    _warn(handler, event, error, "Errors at this event are not counted")
                    return state, Control()
                if (count := state.slots[slot]) == 0:
                    _warn(handler, event, error, f"Later errors are only counted, in state.slots[{slot!r}]")
                return state.with_slot(slot, count + 1), Control(log={slot: count + 1})

        return contained

    return handler.wrapped(contain, errors=slot)


def _checked_call(handler: Handler, state: TrainState, event: Event) -> tuple[TrainState, Control]:
    """Calls a callback, with the checks that the fold makes of its result and the loop of what it logged."""
    new, control = checked_result(handler, event, handler.function(state, event))
    refuse_overreach(handler.name, cause_of(event), state, new)
    refuse_other_structure(handler.name, type(event), state, new)
    refuse_impossible_requests(handler.name, cause_of(event), control)
    for name, entry in control.owned_by(handler.name).log.items():
        check_loggable(name, entry)
    return new, control


def _warn(handler: Handler, event: Event, error: Exception, what_next: str) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    frame = places(frames).own or frames[-1]
    where, text = place(frame.filename, frame.lineno), str(error)
    warn(
        f"The callback {printable(handler.name)} failed at {type(event).__name__} of step {int(event.step)} and is "
        f"undone: {type(error).__name__}{f': {printable(text)}' if text else ''} ({printable(where)}). "
        f"Training continues. {what_next}.",
        RuntimeWarning,
    )
