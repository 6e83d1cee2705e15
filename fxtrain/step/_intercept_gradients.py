"""Intercepts the gradients of a step, so that they can be computed outside the graph of the rest of the step."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator

import torch

from fxtrain.core import Batch, TrainState, Tree

Find = Callable[[TrainState, Batch, int], Tree]
"""``(state, batch, index) -> Gradient``, as returned by ``gradients``."""

Handler = Callable[[Find, TrainState, Batch, int], Tree]
"""Maps such a function and its arguments to the result that the step gets instead."""


class _Here(threading.local):
    handler: Handler | None = None


_here = _Here()


@contextlib.contextmanager
def intercepted(handler: Handler) -> Generator[None]:
    """Passes calls of functions from ``gradients`` to ``handler`` inside the context, in this thread only.

    Example:
        >>> import torch, fxtrain as fx
        >>> find = fx.gradients(lambda model, batch: model(batch).mean())
        >>> state = fx.init(torch.nn.Linear(1, 1))
        >>> with intercepted(lambda find, state, batch, index: "in place of a gradient"):
        ...     find(state, torch.ones(2, 1))
        'in place of a gradient'
    """
    before = _here.handler
    _here.handler = handler
    try:
        yield
    finally:
        _here.handler = before


def handled(find: Find, state: TrainState, batch: Batch, index: int) -> Tree:
    """Returns ``find(state, batch, index)``, or the result of this thread's handler for it."""
    handler = None if torch.compiler.is_dynamo_compiling() else _here.handler
    return find(state, batch, index) if handler is None else handler(find, state, batch, index)
