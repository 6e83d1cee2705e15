"""Makes ``torch.compiler.is_compiling()`` true in the thread that traces a step, and only there.

Libraries check it before they read a tensor's value: a padding mask, a range of indices, a cache. ``torch.compile``
and ``torch.export`` set one flag for the whole process, which would also change what eager steps compute in other
threads. During a trace, the flag is replaced by an object whose truth value depends on the thread.

``is_dynamo_compiling``, ``is_exporting`` and ``torch.jit.is_tracing`` stay False, because no bytecode is interpreted
and shapes are Python ints. Under the latter two, libraries turn sizes into tensors.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import threading
import types
from collections.abc import Callable, Generator
from typing import Any

from fxtrain._torch_internals.dispatch import outside_of_traces
from fxtrain._torch_internals.tracing import compiling_flag, set_compiling_flag


class _ThreadFlag:
    """The flag during a trace: True in threads that trace, its previous value in all others."""

    def __init__(self, otherwise: bool) -> None:
        self.otherwise = otherwise

    def __bool__(self) -> bool:
        return self.otherwise or _thread.depth > 0

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(bool(self))

    def __or__(self, other: bool) -> bool:
        return bool(self) | other

    def __and__(self, other: bool) -> bool:
        return bool(self) & other

    __ror__, __rand__ = __or__, __and__

    def __repr__(self) -> str:
        return repr(bool(self))


class _ThreadState(threading.local):
    depth = 0


_thread = _ThreadState()
_LOADER: Any = importlib.machinery.SourceFileLoader
_EXECUTE: Callable[..., None] = _LOADER.exec_module
_lock = threading.Lock()
_open_traces = 0  # open `compiling` blocks in all threads
_thread_flag: _ThreadFlag | None = None


def _suspending_traces(execute: Callable[..., None]) -> Callable[..., None]:
    """Wraps a loader's ``exec_module`` so that this thread's trace is suspended while a module executes."""

    def execute_outside(loader: object, module: types.ModuleType) -> None:
        if not _thread.depth:
            return execute(loader, module)
        depth, _thread.depth = _thread.depth, 0
        try:
            with outside_of_traces():
                return execute(loader, module)
        finally:
            _thread.depth = depth

    return execute_outside


@contextlib.contextmanager
def compiling() -> Generator[None]:
    """A context in which ``torch.compiler.is_compiling()`` is True, for this thread only.

    Modules imported inside it execute outside of the trace: a tensor created at import time lives as long as the
    process, so it must not belong to the tracer.

    Example:
        >>> import torch
        >>> with compiling():
        ...     bool(torch.compiler.is_compiling()), torch.compiler.is_dynamo_compiling()
        (True, False)
        >>> torch.compiler.is_compiling()
        False
    """
    global _open_traces, _thread_flag
    with _lock:
        if not _open_traces:
            _thread_flag = _ThreadFlag(bool(compiling_flag()))
            set_compiling_flag(_thread_flag)
            _LOADER.exec_module = _suspending_traces(_EXECUTE)
        _open_traces += 1
    _thread.depth += 1
    try:
        yield
    finally:
        _thread.depth -= 1
        with _lock:
            _open_traces -= 1
            # Dynamo may have replaced the flag in another thread meanwhile. It restores this object when it is done,
            # and the object has the original flag's value in every thread once no trace is running.
            if not _open_traces:
                _LOADER.exec_module = _EXECUTE
                if _thread_flag is not None and compiling_flag() is _thread_flag:
                    set_compiling_flag(_thread_flag.otherwise)
