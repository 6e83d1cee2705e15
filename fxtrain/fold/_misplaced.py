"""Detects objects of fxtrain that were passed as callbacks or observers, but belong in another argument."""

from __future__ import annotations

from collections.abc import Mapping

from fxtrain.core import describe

_WRITERS = "fxtrain.writers."
_CHECKPOINTS = "fxtrain.checkpoint."
EXPECTED = {"callbacks": "(state, event) -> (state, control)", "observers": "(state, event, control)"}
"""The functions that each argument takes."""


def refuse_misplaced(value: object, argument: str) -> None:
    """Raises if a callback or an observer is a writer, a checkpointer, a trigger or a collection.

    Args:
        value: The value that was passed.
        argument: ``"callbacks"`` or ``"observers"``, for errors.

    Raises:
        TypeError: The message names the value and where it belongs.
    """
    remedy = _remedy(value, argument)
    if remedy:
        raise TypeError(f"{argument}: expected functions {EXPECTED[argument]}, got {_described(value)}. {remedy}")


def _described(value: object) -> str:
    name = getattr(value, "__name__", None)
    return f"the function {name}" if isinstance(name, str) else describe(value)


def _remedy(value: object, argument: str) -> str:
    from fxtrain.fold._triggers import Trigger  # which imports the callers of this module

    if isinstance(value, Trigger):
        return f"Gate a callback by it: fxtrain.when({value}, callback)."
    if isinstance(value, list | tuple):
        return f"Unpack it, as in {argument}=[*several, another]."
    if isinstance(value, Mapping):
        return f"Pass the values in a list: {argument}=[...]."
    if callable(getattr(value, "write_scalars", None)):
        return "Pass it to an observer: observers=[fxtrain.observers.write(writer)]."
    if callable(getattr(value, "add_scalar", None)):
        return "Use fxtrain's writer: observers=[fxtrain.observers.write(fxtrain.writers.tensorboard(folder))]."
    module = (value if callable(value) and hasattr(value, "__name__") else type(value)).__module__ or ""
    if module.startswith(_WRITERS):
        return f"Call it, and pass the writer to an observer: fxtrain.observers.write({_called(value)})."
    if module.startswith(_CHECKPOINTS):
        return (
            "Pass it as checkpointer=, and save with callbacks=fxtrain.when(fxtrain.every(100), "
            "fxtrain.callbacks.save())."
        )
    return ""


def _called(value: object) -> str:
    return f"{_WRITERS}{getattr(value, '__name__', 'csv')}(...)"
