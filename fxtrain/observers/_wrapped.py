"""Observers made from others: ones that act on rank 0 only or on every rank, and ones whose failure ends the run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fxtrain.core import Control, FitEnd, Observer, TrainState, name_of, takes
from fxtrain.core._rank import rank
from fxtrain.fold._lookalikes import refuse_lookalikes


def rank_zero(observer: Observer) -> Observer:
    """Returns ``observer`` in the process of rank 0, and an observer that does nothing in all others.

    The others copy no metrics to the host. The rank is read when this is called: from torch.distributed if it is
    initialized, otherwise from the environment variable ``RANK``, otherwise it is 0.

    Callbacks must not be restricted to one rank, because all processes must make the same decisions. The observers of
    fxtrain already act on rank 0 only, except for ``profile``, which profiles each process.

    Args:
        observer: A function ``(state, event, control) -> None``. It is not modified.

    Example:
        >>> def announce(state, event: FitEnd, control):
        ...     print(event.reason)
        >>> rank_zero(announce)(None, FitEnd(step=3, reason="reached 3 steps"), Control())
        reached 3 steps
    """
    _refuse_others("rank_zero", observer)
    return observer if rank() == 0 else _do_nothing


def _refuse_others(function: str, observer: Callable[..., object]) -> None:
    refuse_lookalikes(observer, "observers")
    if not takes(observer, 3):
        name = getattr(observer, "name", name_of(observer))
        raise TypeError(
            f"expected an observer for {function}(), got {name}, which does not take (state, event, control). Pass "
            "callbacks to fit in callbacks=."
        )


def _do_nothing(state: TrainState, event: FitEnd, control: Control) -> None:
    """Does nothing. It subscribes to ``FitEnd`` alone, so it costs nothing during training."""


def every_rank(observer: Observer) -> Observer:
    """Returns an observer that acts on all ranks of a run with ``mesh=``, where others act on rank 0 only.

    For logs of each rank, such as its memory. Each rank needs a file of its own.

    Args:
        observer: A function ``(state, event, control) -> None``. It is not modified.

    Example:
        >>> from fxtrain.core import StepEnd
        >>> def watch(state, event: StepEnd, control): ...
        >>> every_rank(watch).every_rank
        True
    """
    _refuse_others("every_rank", observer)

    @functools.wraps(observer, updated=())  # keeps the annotation that subscribes the observer
    def acting(state: TrainState, event: Any, control: Control) -> None:
        observer(state, event, control)

    result = _like(observer, acting, "take_failure", "required", "flush", "close")
    result.every_rank = True
    return result


def _like(observer: Observer, function: Callable[..., None], *others: str) -> Any:
    """Returns the function with the name of an observer, and with ``_ATTRIBUTES`` and others of it."""
    result: Any = function
    result.__name__ = name_of(observer)
    for name in (*_ATTRIBUTES, *others):
        if hasattr(observer, name):
            setattr(result, name, getattr(observer, name))
    return result


_ATTRIBUTES = ("callback_ran", "compile_began", "compile_ended", "keeps", "sees_logged", "every_rank")
"""What an observer may have besides the function, as ``Publisher`` describes."""


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
    _refuse_others("required", observer)
    take_failure: Callable[[], Exception | None] = getattr(observer, "take_failure", lambda: None)

    def strict(act: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(act, updated=())  # keeps the annotation that subscribes the observer
        def raising(*args: object) -> None:
            act(*args)
            failure = take_failure()
            try:
                if failure is not None:
                    raise failure
            finally:
                del failure  # its traceback references this frame

        return raising

    result = _like(observer, strict(observer))
    result.required = True
    for verb in ("flush", "close"):
        setattr(result, verb, strict(getattr(observer, verb, lambda: None)))
    return result
