"""Collects garbage less often while a step is traced and compiled."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator

_NEW_OBJECTS = 50_000
"""New objects after which garbage is collected. Python's default is 700."""


@contextlib.contextmanager
def collecting_rarely() -> Generator[None]:
    """A context in which Python collects garbage less often, unless the user has set it to be as rare.

    The compiler's modules and a traced graph are hundreds of thousands of objects that stay. They cause collections of
    all objects of the process, which find next to nothing and take as long as the trace of a small step.

    Example:
        >>> with collecting_rarely():
        ...     gc.get_threshold()[0] >= 50_000
        True
    """
    before = gc.get_threshold()
    # 0 stands for no automatic collection.
    if not before[0] or before[0] >= _NEW_OBJECTS:
        yield
        return
    gc.set_threshold(_NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
