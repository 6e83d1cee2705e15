"""Interception of the gradients in a step: they are computed outside of the graph that the rest of the step becomes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any

import torch

Find = Callable[[Any, Any, int], Any]
"""``(state, batch, index) -> Gradient``, as from ``gradients``."""

Handler = Callable[[Find, Any, Any, int], Any]
"""From such a function and its arguments to what the step gets in place of its result."""


class _Here(threading.local):
    handler: Handler | None = None


_here = _Here()


@contextlib.contextmanager
def intercepted(handler: Handler) -> Generator[None]:
    """Calls of functions from ``gradients`` go to ``handler`` inside, in this thread alone.

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


def handled(find: Find, state: Any, batch: Any, index: int) -> Any:
    """``find(state, batch, index)``, or what the handler of this thread returns for it."""
    handler = None if torch.compiler.is_dynamo_compiling() else _here.handler
    return find(state, batch, index) if handler is None else handler(find, state, batch, index)
