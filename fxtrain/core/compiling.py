"""``torch.compiler.is_compiling()`` answers True in a thread that traces a step.

Libraries ask before they read a value: a padding mask, a range of indices, a cache. ``torch.compile`` and
``torch.export`` answer through one flag for the whole process, which would also change what eager steps of other
threads compute. The flag is replaced for the time of a trace by an object whose truth depends on the thread.

``is_dynamo_compiling``, ``is_exporting`` and ``torch.jit.is_tracing`` stay False: no bytecode is read, shapes are
numbers, and libraries turn sizes into tensors for the latter two.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from typing import Any

import torch

# The flag has this name since torch 2.2. There is no public way to set it.
_FLAG = "_is_compiling_flag"


class _Answer:
    """True in threads that trace; elsewhere what the flag was before."""

    def __init__(self, otherwise: bool) -> None:
        self.otherwise = otherwise

    def __bool__(self) -> bool:
        return self.otherwise or _here.depth > 0

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(bool(self))

    def __or__(self, other: Any) -> Any:
        return bool(self) | other

    def __and__(self, other: Any) -> Any:
        return bool(self) & other

    __ror__, __rand__ = __or__, __and__

    def __repr__(self) -> str:
        return repr(bool(self))


class _Here(threading.local):
    depth = 0


_here = _Here()
_lock = threading.Lock()
_tracing = 0  # blocks that are open, in all threads
_answer: _Answer | None = None


@contextlib.contextmanager
def compiling() -> Generator[None]:
    """``torch.compiler.is_compiling()`` is True inside, in this thread alone.

    Example:
        >>> with compiling():
        ...     bool(torch.compiler.is_compiling()), torch.compiler.is_dynamo_compiling()
        (True, False)
        >>> torch.compiler.is_compiling()
        False
    """
    global _tracing, _answer
    flags = torch.compiler.__dict__
    with _lock:
        if not _tracing:
            _answer = _Answer(bool(flags[_FLAG]))
            flags[_FLAG] = _answer
        _tracing += 1
    _here.depth += 1
    try:
        yield
    finally:
        _here.depth -= 1
        with _lock:
            _tracing -= 1
            # A session of Dynamo in another thread may have covered the flag. It puts this answer back, which is False
            # in every thread by then.
            if not _tracing and _answer is not None and flags[_FLAG] is _answer:
                flags[_FLAG] = _answer.otherwise
