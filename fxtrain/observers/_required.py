"""Observers whose failure ends the run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fxtrain.core import Control, Event, Observer, TrainState, name_of


def required(observer: Observer) -> Observer:
    """Makes failures of an observer, or of one of its writers, end the run.

    Other observers that fail are reported and dropped.

    Args:
        observer: A function ``(state, event, control) -> None``. It is not modified.

    Returns:
        A required observer that calls ``observer``.

    Example:
        >>> from fxtrain.core import StepEnd
        >>> def watch(state, event: StepEnd, control): ...
        >>> required(watch).required
        True
    """

    @functools.wraps(observer, updated=())  # keeps the annotation that subscribes the observer
    def watched(state: TrainState, event: Event, control: Control) -> None:
        observer(state, event, control)
        raise_contained()

    def raise_contained() -> None:
        failure = take_failure()
        if failure is not None:
            raise failure

    def strict(act: Callable[[], None]) -> Callable[[], None]:
        def acting() -> None:
            act()
            raise_contained()

        return acting

    take_failure: Callable[[], Exception | None] = getattr(observer, "take_failure", lambda: None)

    result: Any = watched
    result.__name__ = name_of(observer)
    result.required = True
    result.sees_logged = getattr(observer, "sees_logged", False)
    for verb in ("flush", "close"):
        setattr(result, verb, strict(getattr(observer, verb, lambda: None)))
    return result
