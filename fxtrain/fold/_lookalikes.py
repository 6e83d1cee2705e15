"""Detects values in place of callbacks and observers: uncalled factories, other objects, those of other libraries."""

from __future__ import annotations

import sys
import types

from fxtrain.equivalents import refuse_foreign, refuse_foreign_callback
from fxtrain.fold._misplaced import EXPECTED, refuse_misplaced


def refuse_lookalikes(callback: object, argument: str) -> None:
    """Raises if a callback or an observer is an uncalled factory, belongs elsewhere, or is from another library.

    Args:
        callback: The value that was passed.
        argument: ``"callbacks"`` or ``"observers"``, for errors.

    Raises:
        TypeError: The message names the value and what to pass in its place.
    """
    room = ".".join((getattr(callback, "__module__", None) or "").split(".")[:2])
    if (
        isinstance(callback, types.FunctionType)
        and room in ("fxtrain.callbacks", "fxtrain.observers")
        and getattr(sys.modules[room], callback.__name__, None) is callback
    ):
        raise TypeError(
            f"{argument}: expected the result of {room}.{callback.__name__}(...), got the function itself. Call it."
        )
    expected = "functions (state, event, control)" if argument == "observers" else "functions (state, event)"
    refuse_foreign_callback(argument, expected, callback)
    refuse_misplaced(callback, argument)
    refuse_foreign(f"each {argument.removesuffix('s')}", f"a function {EXPECTED[argument]}", callback)
