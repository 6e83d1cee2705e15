"""A context that wraps the functions run by ``Model.call``, so that another compiler can compile the forward pass."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any

from fxtrain.model._types import Out

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Here(threading.local):
    wrap: Wrap | None = None


_here = _Here()


@contextlib.contextmanager
def forward_wrapped_by(wrap: Wrap | None) -> Generator[None]:
    """Makes ``Model.call`` run ``wrap(function)`` in place of ``function`` inside the context, in this thread only.

    Args:
        wrap: Maps a function ``(model, *args)`` to one that computes the same. None leaves functions unwrapped.

    Example:
        >>> import fxtrain as fx
        >>> state = fx.init(__import__("torch").nn.ReLU())
        >>> with forward_wrapped_by(lambda function: lambda *args: "wrapped"):
        ...     state.model.call(state.params, state.buffers, lambda model: "plain", train=True)[0]
        'wrapped'
    """
    before = _here.wrap
    _here.wrap = wrap
    try:
        yield
    finally:
        _here.wrap = before


def is_forward_wrapped() -> bool:
    """Returns whether this thread is inside ``forward_wrapped_by`` with a wrap."""
    return _here.wrap is not None


def forward_of(function: Callable[..., Out]) -> Callable[..., Out]:
    """Returns the function, wrapped by the innermost ``forward_wrapped_by``."""
    return function if _here.wrap is None else _here.wrap(function)
